"""linear_attention: cases for the laws and for the kernels, exact sums, its memory, and what is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import linear_attention, protocol
from jaxlinear.ops.linear_attention.op import choose
from tests import numerics
from tests.ops import cases

BACKENDS = ["recurrent", "chunked"]
KINDS = ["constant", "scalar", "channel"]
# name: B, T, H, K, V, decay, segments, chunk
CASES = {
    "one_token": (3, 1, 2, 4, 3, "channel", True, None),
    "short": (2, 7, 1, 3, 5, "scalar", True, 4),
    "short_channel": (1, 7, 2, 5, 3, "channel", False, 3),
    "none": (1, 64, 2, 4, 6, "none", True, 16),
    "constant": (2, 100, 3, 4, 4, "constant", False, 32),
    "constant_packed": (1, 100, 2, 4, 6, "constant", True, None),
    "scalar": (1, 257, 1, 8, 4, "scalar", True, None),
    "channel": (1, 257, 2, 8, 4, "channel", True, 32),
    "channel_whole_chunks": (2, 64, 1, 4, 6, "channel", True, None),
    "no_documents": (1, 100, 4, 4, 3, "scalar", False, 100),
}
RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "none", "constant", "scalar", "channel")),
    *((name, dtype, "recurrent") for name, dtype in numerics.each_dtype(["one_token", "none", "constant"], "channel")),
]


draw_decay = cases.draw_decay
reference = functools.partial(cases.reference, "linear_attention")


@functools.cache
def case(name):
    batch, length, heads, width, value_width, kind, packed, _ = CASES[name]
    random = np.random.default_rng(length + width)
    q, k = (numerics.normal(random, batch, length, heads, width) for _ in range(2))
    v = numerics.normal(random, batch, length, heads, value_width)
    state = numerics.normal(random, batch, heads, width, value_width)
    inputs = (q, k, v, draw_decay(random, kind, batch, length, heads, width), state)
    ids = cases.documents(random, batch, length) if packed else None
    return cases.expected(random, "linear_attention", inputs, ids)


def options(name, backend):
    return {"chunk_size": CASES[name][-1] if backend == "chunked" else None, "backend": backend}


@pytest.mark.parametrize("shape", [(100, 2), (100, 2, 3), (2,)], ids=["scalar", "channel", "constant"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_forgets_and_one_sums(backend, shape):
    """Whole numbers, so that float32 is exact."""
    random = np.random.default_rng(2)
    q, k, v, state = (
        jnp.asarray(random.integers(-4, 5, shape), jnp.float32)
        for shape in ((1, 100, 2, 3), (1, 100, 2, 3), (1, 100, 2, 4), (1, 2, 3, 4))
    )
    shape = shape if len(shape) == 1 else (1, *shape)

    @numerics.jit
    def run(log_decay):
        return linear_attention(q, k, v, log_decay, state, scale=1.0, backend=backend)

    writes = np.einsum("bthk,bthv->bthkv", k, v)
    for nothing in (-jnp.inf, -1e4):
        o, final = run(jnp.full(shape, nothing))
        assert np.array_equal(o, np.einsum("bthk,bthkv->bthv", q, writes)) and np.array_equal(final, writes[:, -1])
    sums = np.cumsum(writes, axis=1) + np.asarray(state)[:, None]
    for all_of_it in (jnp.zeros(shape), None):
        o, final = run(all_of_it)
        assert np.array_equal(o, np.einsum("bthk,bthkv->bthv", q, sums)) and np.array_equal(final, sums[:, -1])


def at_the_limits(kind, log_decay, *, length=100, heads=2, width=4):
    return cases.at_the_limits(kind, log_decay, length, heads, width)[1:]


def test_no_decay_adds_up_65536_tokens():
    """Whole numbers, so that float32 is exact."""
    random = np.random.default_rng(6)
    q, k, v = (random.integers(-1, 2, (1, 65_536, 1, 2)).astype(np.float64) for _ in range(3))
    o, final = numerics.run(numerics.jit(functools.partial(linear_attention, scale=1.0)), q, k, v, dtype="float32")
    sums = np.cumsum(np.einsum("bthk,bthv->bthkv", k, v), axis=1)
    assert np.array_equal(o, np.einsum("bthk,bthkv->bthv", q, sums)) and np.array_equal(final, sums[:, -1])


def assert_states_are_float32(run, kind):
    """The state, and backward its gradient, sums 1,001 equal terms: a bfloat16 sum stops growing at 256."""
    x, state = jnp.ones((1, 1001, 1, 16), jnp.bfloat16), jnp.zeros((1, 1, 16, 16))
    shapes = {"constant": (1,), "scalar": x.shape[:3], "channel": x.shape}
    log_decay = None if kind == "none" else jnp.zeros(shapes[kind])
    both = numerics.with_gradients(lambda state: run(x, x, x, log_decay, state))
    (o, final), (d_state,) = both((state,), (jnp.ones_like(x), jnp.zeros_like(state)))
    assert o.dtype == jnp.bfloat16 and np.all(final == 1001) and np.all(d_state == 1001 / 4)  # K^-1/2


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_memory_grows_with_the_inputs_and_a_state_a_chunk(kind):
    heads, width = 2, 32

    def temporaries(length):
        return cases.temporaries(linear_attention, *[(1, length, heads, width)] * (3 if kind == "none" else 4))

    short, long = temporaries(8_192), temporaries(16_384)
    # Of all tokens' states, those before each chunk are a 64th or a 32nd, and an array like the inputs is a 32nd.
    assert 0 < long - short <= 8_192 * heads * width * width * 4 / 16
    # For any T: one group of chunks, and what follows from it.
    assert short - (long - short) < 10 * protocol._CPU_GROUP_BYTES


def test_auto_takes_chunks_for_more_than_a_few_tokens():
    def chunk(backend, length, chunk_size=None):
        q = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
        return choose(q, q, q, backend=backend, chunk_size=chunk_size).chunk

    assert [chunk("auto", length) for length in (1, 8, 9, 33, 10_000)] == [None, None, 16, 64, 64]
    assert [chunk("chunked", length) for length in (1, 8, 100)] == [1, 8, 64]
    assert chunk("recurrent", 10_000) is None
    assert chunk("auto", 1, chunk_size=5) == 5
