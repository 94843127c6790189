"""generation.py: the next token is drawn as the sampling's options say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import generation
from jaxlinear.generation import Sampling, sample
from jaxlinear.ops import backends


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


P = np.array([0.4, 0.05, 0.25, 0.05, 0.2, 0.05], np.float32)


def _frequencies(draws=4000, **options):
    sampling = Sampling(**options)
    values = sampling.values | {"vocab_size": np.int32(len(P))}
    keys = jax.random.split(jax.random.key(0), draws)
    logits = jnp.broadcast_to(jnp.log(P)[None], (draws, len(P)))
    drawn = sample(logits, keys, values, sampling.filters)
    return np.bincount(drawn, minlength=len(P)) / draws


def _kept(*which, power=1.0):
    kept = np.zeros_like(P)
    kept[list(which)] = P[list(which)] ** power
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, P),
        ({"temperature": 2.0}, P**0.5 / (P**0.5).sum()),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"temperature": 0.0}, _kept(0)),
        ({"temperature": 1e-30}, _kept(0)),
        ({"top_k": 1}, _kept(0)),
        ({"top_k": 2}, _kept(0, 2)),
        ({"top_k": 4}, P),  # three tie for the fourth place
        ({"top_k": 100}, P),
        ({"top_p": 0.3}, _kept(0)),
        ({"top_p": 0.6}, _kept(0, 2)),
        ({"top_p": 0.7}, _kept(0, 2, 4)),
        ({"top_p": 1e-6}, _kept(0)),
        ({"top_k": 2, "top_p": 0.6}, _kept(0)),  # of the two left, the first has 0.4 / 0.65, which is enough
        # Of the probabilities at that temperature: 0.59 for the first token, and 0.28, 0.22 and 0.20 for the first three.
        ({"temperature": 0.5, "top_p": 0.55}, _kept(0)),
        ({"temperature": 2.0, "top_p": 0.6}, _kept(0, 2, 4, power=0.5)),
    ],
)
def test_sampling_statistics(options, expected):
    frequencies = _frequencies(**options)
    np.testing.assert_array_equal(frequencies[expected == 0], 0)
    # At most four standard deviations of a frequency over 4,000 draws.
    np.testing.assert_allclose(frequencies, expected, rtol=0, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("top_p", [1e-40, 1e-60])
def test_a_part_that_is_nothing_to_a_float32_keeps_the_likeliest(top_p):
    sampling = Sampling(top_p=top_p)
    values = sampling.values | {"vocab_size": np.int32(len(P))}
    logits = jnp.log(jnp.roll(P, 3))[None]
    assert sample(logits, jax.random.split(jax.random.key(0), 1), values, sampling.filters).tolist() == [3]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_nucleus_is_that_of_sorting(platform):
    """One bit at a time on CPU, and three at a time on TPU."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.full(200, 0.1), 16).astype(np.float32)
    with backends.use_platform(platform):
        kept = np.asarray(generation._keep(jnp.asarray(p), jnp.asarray(p), jnp.full((16, 1), 0.8, jnp.float32))) > 0
    for row, keep in zip(p, kept, strict=True):
        order = np.argsort(-row)
        count = int(np.searchsorted(np.cumsum(row[order], dtype=np.float64), 0.8)) + 1
        assert set(np.flatnonzero(keep)) == set(order[:count])


@pytest.mark.slow
def test_rare_tokens_of_a_large_vocabulary():
    """Each has a ten-millionth, all together 0.03: 15 of 500 draws, with a standard deviation of 3.8. Noise that is never
    above 16 would give 4."""
    size, share = 2**18, 0.03
    logits = jnp.full((1, size), np.log(share / (1 - share) / (size - 1)), jnp.float32).at[0, 0].set(0.0)
    values = Sampling().values | {"vocab_size": np.int32(size)}
    one = lambda key: sample(logits, key[None], values, (True, False, False))[0]  # noqa: E731
    drawn = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), 500))
    assert 9 <= np.count_nonzero(drawn) <= 24
