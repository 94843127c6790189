"""delta_rule: cases for the laws and for the kernels, what it writes and reads, its memory, and what is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, delta_rule
from jaxlinear.ops.delta_rule.op import choose
from tests import numerics
from tests.ops import cases

BACKENDS = ["recurrent", "chunked"]
# name: B, T, H, K, V, decay, segments, chunk
CASES = {
    "one_token": (3, 1, 2, 4, 3, "channel", True, None),
    "short": (2, 7, 1, 3, 5, "scalar", True, 4),
    "short_channel": (1, 7, 2, 5, 3, "channel", False, 3),
    "none": (1, 64, 2, 4, 6, "none", True, 16),
    "none_long": (2, 100, 3, 4, 4, "none", False, None),
    "scalar": (1, 257, 1, 8, 4, "scalar", True, None),
    "scalar_whole": (1, 100, 2, 4, 4, "scalar", False, 100),
    "channel": (1, 257, 2, 8, 4, "channel", True, None),
}
RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "none", "scalar", "channel")),
    *((name, dtype, "recurrent") for name, dtype in numerics.each_dtype(["one_token", "none", "scalar"], "channel")),
]


def unit(x):
    return numerics.representable(x / np.linalg.norm(x, axis=-1, keepdims=True))


draw_decay = cases.draw_decay
reference = functools.partial(cases.reference, "delta_rule")


@functools.cache
def case(name):
    batch, length, heads, width, value_width, kind, packed, _ = CASES[name]
    random = np.random.default_rng(length + width)
    q, k = (numerics.normal(random, batch, length, heads, width) for _ in range(2))
    v = numerics.normal(random, batch, length, heads, value_width)
    beta = numerics.uniform(random, batch, length, heads, low=-0.1, high=1.9)
    state = numerics.normal(random, batch, heads, width, value_width)
    inputs = (q, unit(k), v, beta, draw_decay(random, kind, batch, length, heads, width), state)
    ids = cases.documents(random, batch, length) if packed else None
    return cases.expected(random, "delta_rule", inputs, ids)


def options(name, backend):
    return {"chunk_size": CASES[name][-1] if backend == "chunked" else None, "backend": backend}


@pytest.mark.parametrize("options", [{"backend": "recurrent"}, {"chunk_size": 5}], ids=str)
def test_what_is_not_written_decays_and_what_was_last_written_is_read(options):
    """Without writes, with writes at unit keys, and with decays to zero."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((16, 12, 2, width)) for width in (3, 3, 2))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta, log_decay = random.uniform(0, 2, (16, 12, 2)), -random.uniform(0, 1, q.shape)
    state = random.standard_normal((16, 2, 3, 2))
    op = numerics.jit(functools.partial(delta_rule, scale=1.0, **options))
    run = lambda *inputs: numerics.run(op, *inputs, state, dtype="float64")  # noqa: E731
    o, final = run(q, k, v, 0 * beta, 0 * log_decay)
    assert np.array_equal(final, state)
    numerics.assert_close(o, np.einsum("bthk,bhkv->bthv", q, state), 1e-14)
    _, final = run(q, k, v, 0 * beta, log_decay)
    numerics.assert_close(final, np.exp(log_decay.sum(axis=1))[..., None] * state, 1e-13)
    o, final = run(k, k, v, np.ones_like(beta), 0 * log_decay)
    numerics.assert_close(o, v, 1e-12)
    numerics.assert_close(np.einsum("bhk,bhkv->bhv", k[:, -1], final), v[:, -1], 1e-12)
    writes = np.einsum("bth,bthk,bthv->bthkv", beta, k, v)
    for nothing in (-np.inf, -1e4):
        found = run(q, k, v, beta, np.full_like(log_decay, nothing))
        numerics.assert_close(found, (np.einsum("bthk,bthkv->bthv", q, writes), writes[:, -1]), 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_is_exact(backend):
    """Keys select the rows of a table and beta is 1: each token writes one row and reads one. Whole numbers in float32."""
    random = np.random.default_rng(2)
    written, read = random.integers(0, 4, (2, 257))
    v, table = random.integers(-9, 10, (257, 3)), random.integers(-9, 10, (4, 3))
    keys, queries = (np.eye(4)[None, rows, None] for rows in (written, read))
    inputs = queries, keys, v[None, :, None], np.ones((1, 257, 1)), table[None, None]
    run = numerics.jit(lambda q, k, v, beta, s: delta_rule(q, k, v, beta, None, s, scale=1.0, backend=backend))
    o, final = numerics.run(run, *(x.astype(np.float64) for x in inputs), dtype="float32")
    for t in range(257):
        table[written[t]] = v[t]
        assert np.array_equal(o[0, t, 0], table[read[t]])
    assert np.array_equal(final[0, 0], table)


def assert_states_are_float32(run, kind):
    """Keys of 0 replace nothing: the state, and backward its gradient, only decays. Bfloat16 loses its steps of 2^-12."""
    nothing, state = jnp.zeros((1, 1001, 1, 16), jnp.bfloat16), jnp.ones((1, 1, 16, 16))
    beta = jnp.ones(nothing.shape[:3])
    log_decay = jnp.full(nothing.shape if kind == "channel" else beta.shape, -(2.0**-12))
    both = numerics.with_gradients(lambda state: run(nothing, nothing, nothing + 1, beta, log_decay, state))
    (o, final), (d_state,) = both((state,), (nothing, state))
    assert o.dtype == jnp.bfloat16
    numerics.assert_close((final, d_state), (np.full(state.shape, np.exp(-1001 * 2.0**-12)),) * 2, 1e-4)


def at_the_limits(kind, log_decay=None, beta=None, *, length=100, heads=2, width=4):
    random, q, k, v, log_decay, state = cases.at_the_limits(kind, log_decay, length, heads, width)
    drawn = numerics.uniform(random, 1, length, heads)
    return q, unit(k), v, drawn if beta is None else np.full_like(drawn, beta), log_decay, state


@pytest.mark.parametrize("kind, chunk", [("none", 64), ("channel", 32)])
def test_memory_grows_with_the_inputs_and_a_state_a_chunk(kind, chunk):
    heads, width = 2, 32

    def temporaries(length):
        array = (1, length, heads, width)
        return cases.temporaries(delta_rule, array, array, array, array[:3], *([] if kind == "none" else [array]))

    short, long = temporaries(8_192), temporaries(16_384)
    assert long < 2.02 * short
    # Besides the states before each chunk there are only a few arrays like the inputs, each a 32nd of all tokens' states.
    assert long < 16_384 * heads * width * width * 4 * (1 / chunk + 5 / width)


def test_auto_takes_chunks_for_more_than_a_few_tokens():
    inputs = numerics.cast(case("scalar")[0], "float32")
    runs = {name: numerics.jit(functools.partial(delta_rule, backend=name)) for name in ("auto", *BACKENDS)}
    for length, chosen in ((1, "recurrent"), (8, "recurrent"), (9, "chunked")):
        texts = {name: run.lower(*(x[:, :length] for x in inputs[:5])).as_text() for name, run in runs.items()}
        assert texts["auto"] == texts[chosen]
        assert texts["recurrent"] != texts["chunked"]


def like_keys(beta):
    """256 tokens: queries, one shared key and values in bfloat16, and beta."""
    random = np.random.default_rng(0)
    q, v, key = (
        random.standard_normal((1, 256, 1, 64)),
        random.standard_normal((1, 256, 1, 64)),
        random.standard_normal(64),
    )
    k = np.broadcast_to(key / np.linalg.norm(key), q.shape)
    return *(jnp.asarray(x, jnp.bfloat16) for x in (q / 8, k, v)), jnp.full((1, 256, 1), beta, jnp.float32)


@pytest.mark.parametrize("beta", [1.0, 1.9, 2.0])
def test_negative_eigenvalues_keep_their_digits_where_keys_are_alike(beta):
    """In chunks, and in the kernel, which at beta = 2 loses digits unless ``negative_eigenvalues`` is set."""
    given = like_keys(beta)
    with jax.enable_x64(True):
        expected = np.asarray(delta_rule(*(x.astype(jnp.float64) for x in given), backend="recurrent")[0])

    def error(**options):
        o, _ = delta_rule(*given, **options)
        return np.linalg.norm(np.asarray(o, np.float64) - expected) / np.linalg.norm(expected)

    assert error(backend="chunked", negative_eigenvalues=True) < 0.03
    if beta == 2.0:
        assert error(backend="pallas", negative_eigenvalues=True) < 0.03
        assert error(backend="pallas") > 0.3


@pytest.mark.parametrize("platform, kind", [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100 80GB HBM3")])
def test_negative_eigenvalues_have_a_kernel(platform, kind):
    x = jnp.ones((1, 9, 2, 256), jnp.bfloat16)
    with backends.use_platform(platform, kind):
        assert choose(x, x, x, negative_eigenvalues=True).is_kernel
        assert choose(x, x, x, chunk_size=64).is_kernel
        if platform == "gpu":  # the inverse of 64 tokens, then in two terms, finds no registers beside 256 keys
            assert choose(x, x, x, chunk_size=64, negative_eigenvalues=True).name == "chunked"
            with pytest.raises(UserError, match="chunks of a power of two from 16 to 32 tokens, not of 64"):
                choose(x, x, x, chunk_size=64, backend="pallas", negative_eigenvalues=True)
