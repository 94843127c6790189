"""The linear recurrent unit: its initial values, and its limits. Its outputs: test_mixers.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.lru import LRU
from tests import numerics, small

D, N = 32, 4096


@functools.cache
def at_start():
    return LRU(small.config(width=D, recurrent_width=N), rngs=nnx.Rngs(0))


def test_the_transition_at_the_start():
    """|a|^2 is uniform between the squares of 0.9 and 0.999, the phase uniform over the circle."""
    unit = at_start()
    nu, theta, gamma = (np.asarray(p[...], np.float64) for p in (unit.nu, unit.theta, unit.gamma))
    square = np.exp(-2 * np.exp(nu))
    assert square.min() > 0.81 - 1e-6 and square.max() < 0.999**2 + 1e-6
    tenths = np.linspace(0.1, 0.9, 9)
    for place in ((square - 0.81) / (0.999**2 - 0.81), np.exp(theta) / (2 * np.pi)):
        numerics.assert_close(np.quantile(place, tenths), tenths, 0.03)
    numerics.assert_close(np.exp(2 * gamma), 1 - square, 1e-5)
    for kernel, deviation in ((unit.input_kernel, (2 * D) ** -0.5), (unit.output_kernel, N**-0.5)):
        for part in kernel[...]:
            assert np.std(part) == pytest.approx(deviation, rel=0.02)


def test_white_noise_gives_states_and_outputs_of_variance_one():
    """The skip adds as much again. After 2,000 tokens from an empty state, exp(-2) of the longest memory is missing."""
    unit = at_start()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2000, D)), jnp.float32)
    z, h = numerics.jit(lambda x: unit.recur(x, None, None))(x)
    assert np.mean(np.abs(h) ** 2) == pytest.approx(1, rel=0.2)
    assert np.var((z - unit.skip[...][None, None] * x)[:, -500:]) == pytest.approx(1, rel=0.2)
    assert np.var(unit.skip[...]) == pytest.approx(1, rel=0.5)


def test_gradients_are_finite_at_every_decay():
    """At -40 the modulus of a is exactly 1; at 40 it is 0."""
    graph, parameters = small.module(lambda rngs: LRU(small.config(), rngs=rngs))
    parameters, x = numerics.cast((parameters, numerics.normal(np.random.default_rng(3), 1, 50, 16)), "float32")
    run = numerics.with_gradients(lambda parameters, x: nnx.merge(graph, parameters)(x)[0])
    for nu in (-40.0, -10.0, 3.0, 40.0):
        values, gradients = run((parameters | {"nu": jnp.full((24,), nu)}, x), np.ones((1, 50, 16)))
        assert all(jnp.isfinite(y).all() for y in jax.tree.leaves((values, gradients))), nu
