"""Decays within a chunk against sums written out, their gradients, and decays at the limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import decay
from tests import numerics

WIDTH = 6


def chosen(length):
    """Which log decays apply, ``[..., c]`` bool: to token j for i, to the state before for i, to j for the state after."""
    i, j, m = np.ogrid[:length, :length, :length]
    return (j < m) & (m <= i), (m <= i)[:, 0], (j < m)[0]


def oracle(q, k, log_decay):
    """All results, with every sum written out; an infinite log decay affects only the sums that contain it."""
    pairs, since_start, until_end = chosen(q.shape[-2])

    def exp_of_sum(which):
        terms = jnp.where(which[..., None], jnp.expand_dims(log_decay, tuple(range(1, which.ndim))), 0.0)
        return jnp.exp(jnp.sum(terms, axis=-2))

    log_decay = log_decay.reshape(-1, *log_decay.shape[-2:])
    shape = q.shape[:-1]
    decays = exp_of_sum(pairs)
    lower = np.tri(q.shape[-2])[None, :, :, None]
    flat_k = k.reshape(-1, *k.shape[-2:])[:, None]
    products = [
        jnp.sum(lower * decays * r.reshape(-1, *r.shape[-2:])[:, :, None] * flat_k, axis=-1).reshape(*shape, shape[-1])
        for r in (q, k)
    ]
    ends = [exp_of_sum(which).reshape(*shape, -1) for which in (since_start, until_end)]
    return tuple(products), *ends, jnp.exp(jnp.sum(log_decay, axis=-2)).reshape(*shape[:-1], -1)


def all_of_it(q, k, log_decay):
    ends = (decay.since_start(log_decay), decay.until_end(log_decay), decay.whole(log_decay))
    return decay.pairwise((q, k), k, log_decay), *ends


@functools.cache
def run(which):
    return numerics.with_gradients({"oracle": oracle, "found": all_of_it}[which])


def draw(length, channels, kind, seed=0):
    random = np.random.default_rng(seed)
    q, k = random.standard_normal((2, 2, 1, length, WIDTH))
    shape = (2, 1, length, WIDTH if channels else 1)
    log_decay = {
        "usual": lambda: -np.exp(random.uniform(-7, 2, shape)),
        "mixed": lambda: random.choice([-np.inf, -1e4, -50.0, -1e-3, -1e-7, 0.0], shape),
        "weak": lambda: np.full(shape, -1e-7),
        "strong": lambda: np.full(shape, -50.0),
    }[kind]()
    return q, k, log_decay.astype(np.float32).astype(np.float64)


def cotangents(inputs):
    shapes = jax.eval_shape(all_of_it, *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs))
    return numerics.cotangents_like(np.random.default_rng(1), jax.tree.map(lambda x: np.zeros(x.shape), shapes))


# One block of 8, part of one, several with or without a rest; a length of 1 has no pairs.
@pytest.mark.parametrize(
    "length, channels, kind",
    [
        *((length, True, "usual") for length in (1, 5, 32)),
        *((20, channels, kind) for channels in (False, True) for kind in ("usual", "mixed", "weak", "strong")),
    ],
)
def test_values_and_gradients(length, channels, kind):
    inputs = draw(length, channels, kind)
    expected = numerics.run(run("oracle"), inputs, cotangents(inputs), dtype="float64")
    for dtype, tolerance in (("float64", 1e-13), ("float32", 3e-6)):
        found = numerics.run(run("found"), inputs, cotangents(inputs), dtype=dtype)
        numerics.assert_close(found, numerics.wide(expected), tolerance)


@pytest.mark.parametrize("channels", [False, True])
def test_no_decay_is_a_decay_of_one(channels):
    q, k, log_decay = numerics.cast(draw(20, channels, "usual"), "float32")
    products, since_start, *_ = numerics.jit(all_of_it)(q, k, jnp.zeros_like(log_decay))
    numerics.assert_close(products, numerics.jit(lambda: decay.pairwise((q, k), k, None))(), 1e-6)
    assert np.array_equal(since_start, jnp.ones_like(log_decay))


@pytest.mark.parametrize("channels", [None, False, True])
def test_rows_are_multiplied_in_their_own_dtype(channels):
    q, k, log_decay = numerics.cast(draw(20, bool(channels), "usual"), "float32")
    log_decay = None if channels is None else log_decay

    @numerics.jit
    def products_and_gradients(q, k):
        products, pullback = jax.vjp(lambda q, k: decay.pairwise((q, k), k, log_decay), q, k)
        return products, pullback(products)

    products, gradients = products_and_gradients(q.astype(jnp.bfloat16), k)
    assert [x.dtype for x in (*products, *gradients)] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    expected, expected_gradients = products_and_gradients(q, k)
    numerics.assert_close(products[1], expected[1], 1e-6)
    numerics.assert_close((products, gradients), (expected, expected_gradients), 2e-2)
