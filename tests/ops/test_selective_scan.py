"""selective_scan: cases for the laws, its place in linear attention, and its memory."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import linear_attention, selective_scan
from tests import numerics
from tests.ops import cases

BACKENDS = ["recurrent", "chunked"]
# name: B, T, D, N, whether the transition has its own rates, documents, chunk
CASES = {
    "one_token": (3, 1, 4, 3, True, True, None),
    "short": (2, 7, 3, 5, True, True, 4),
    "short_of_keys": (1, 7, 5, 3, False, False, 3),
    "rates": (1, 257, 6, 4, True, True, 32),
    "of_keys": (1, 257, 6, 4, False, True, None),
    "whole_blocks": (2, 64, 4, 1, True, False, 16),
}
RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "rates", "of_keys")),
    *((name, dtype, "recurrent") for name, dtype in numerics.each_dtype(["one_token", "short_of_keys"], "rates")),
]


def draw(random, batch, length, width, states, with_rates):
    """Decays from almost 1 to 1e-9."""
    x = numerics.normal(random, batch, length, width)
    A = -numerics.uniform(random, width, states, low=0.5, high=states) if with_rates else None
    B, C = (numerics.normal(random, batch, length, states) for _ in range(2))
    dt = numerics.representable(np.exp(random.uniform(-7, 1, x.shape)))
    if A is None:  # a token may forget the whole state, but not more
        dt = numerics.representable(dt / (1 + dt * np.sum(B**2, axis=-1, keepdims=True)))
    return x, dt, A, B, C, numerics.normal(random, batch, width, states)


@functools.cache
def case(name):
    *shape, packed, _ = CASES[name]
    random = np.random.default_rng(shape[1] + shape[2])
    inputs = draw(random, *shape)
    ids = cases.documents(random, *shape[:2]) if packed else None
    return cases.expected(random, "selective_scan", inputs, ids)


def options(name, backend):
    return {"chunk_size": CASES[name][-1] if backend == "chunked" else None, "backend": backend}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_channel_is_a_head_of_linear_attention_with_values_of_one(backend):
    """B is the key, C the query and dt A the decay by key channel."""
    x, dt, A, B, C, state = case("rates")[0]
    queries, keys = (np.broadcast_to(y[:, :, None], (*x.shape, B.shape[2])) for y in (C, B))
    attend = numerics.jit(functools.partial(linear_attention, scale=1.0, backend="recurrent"))
    inputs = queries, keys, (dt * x)[..., None], dt[..., None] * A, state[..., None]
    o, final = numerics.run(attend, *inputs, dtype="float64")
    run = numerics.jit(functools.partial(selective_scan, backend=backend))
    found = numerics.run(run, x, dt, A, B, C, state, dtype="float64")
    numerics.assert_close(found, (o[..., 0], final[..., 0]), 1e-12)


def assert_states_are_float32(run):
    """x is 0 in bfloat16: the state, and backward its gradient, only decays. Bfloat16 loses its steps of 2^-12."""
    x, state = jnp.zeros((1, 1001, 4), jnp.bfloat16), jnp.ones((1, 4, 3))
    dt, A, B = jnp.full(x.shape, 2.0**-12), -jnp.ones((4, 3)), jnp.ones((1, 1001, 3))
    both = numerics.with_gradients(lambda state: run(x, dt, A, B, B, state))
    (y, final), (d_state,) = both((state,), (x, state))
    assert y.dtype == jnp.bfloat16
    numerics.assert_close((final, d_state), (np.full(state.shape, np.exp(-1001 * 2.0**-12)),) * 2, 1e-4)


reference = functools.partial(cases.reference, "selective_scan")


def at_the_limits(kind, time_steps, *, length=100, heads=2, width=2):
    """Tokens with the time steps ``time_steps(random, shape)`` and rates of their own."""
    random = np.random.default_rng(4)
    x, _, *rest = draw(random, 1, length, heads * width, width + 1, kind == "rates")
    return x, np.asarray(time_steps(random, x.shape)).astype(np.float32).astype(np.float64), *rest


@pytest.mark.parametrize("batch, chunk, block", [(1, 64, 64), (64, None, 16)], ids=["given", "by default"])
def test_memory_grows_with_the_inputs_and_a_state_a_block(batch, chunk, block):
    """By default, even if one token's states fill the cache, blocks have at least 16 tokens."""
    width, states = 64, 16

    def temporaries(length):
        run = functools.partial(selective_scan, chunk_size=chunk)
        x, B = (batch, length, width), (batch, length, states)
        return cases.temporaries(run, x, x, (width, states), B, B)

    lengths = 8_192 // batch, 16_384 // batch
    short, long = map(temporaries, lengths)
    # An array like x is a 16th of all tokens' states.
    assert 0 < long - short <= 8_192 * width * states * 4 * (1 / block + 4 / 16)
