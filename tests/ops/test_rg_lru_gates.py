"""The RG-LRU's gates by a loop over tokens and channels, for the tests of the RG-LRU; and the bounded root."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.ops.rg_lru.gates import bounded_sqrt
from tests import numerics, oracles


def draw(batch, length, blocks, block):
    """The arguments but ``first``, and that. Small rates make a close to 1, but the slope of the root not too large."""
    random = np.random.default_rng(length + block)
    width = blocks * block
    kernels = numerics.representable(numerics.normal(random, 2, blocks, block, block) / block**0.5)
    biases = numerics.normal(random, 2, width)
    rate = numerics.representable(-(10 ** random.uniform(-4, 1, width)))
    first = random.random((batch, length)) < 0.1
    first[:, 0] = True
    x = numerics.normal(random, batch, length, width)
    return (x, kernels[0], biases[0], kernels[1], biases[1], rate), first


def expected_values(x, recurrence_kernel, recurrence_bias, input_kernel, input_bias, rate, first):
    a, u = np.zeros(x.shape), np.zeros(x.shape)
    block = recurrence_kernel.shape[1]
    for b, t, d in np.ndindex(*x.shape):
        n, j = divmod(d, block)
        own = x[b, t, n * block : (n + 1) * block]
        r = oracles.sigmoid(own @ recurrence_kernel[n, :, j] + recurrence_bias[d])
        i = oracles.sigmoid(own @ input_kernel[n, :, j] + input_bias[d])
        a[b, t, d] = np.exp(rate[d] * r)
        weight = 1 if first[b, t] else np.sqrt(-np.expm1(2 * rate[d] * r))
        u[b, t, d] = weight * i * x[b, t, d]
    return a, u


def test_the_slope_of_the_root_is_bounded():
    x = jnp.array([0.0, 1e-8, 2.5e-7, 1e-4, 0.25, 1.0])
    assert np.array_equal(bounded_sqrt(x), jnp.sqrt(x))
    slopes = jax.vmap(jax.grad(bounded_sqrt))(x)
    numerics.assert_close(slopes, np.array([1000, 1000, 1000, 50, 1, 0.5]), 1e-6)
    numerics.assert_close(slopes[3:], np.array([50, 1, 0.5]), 1e-6)
