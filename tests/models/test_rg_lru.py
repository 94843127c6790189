"""The RG-LRU against the oracle, its gradients, its square root, and its initial values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.rg_lru import RGLRU
from tests import naive, numerics, oracles, small

IDS = np.array([[1] * 20, [1] * 3 + [2] * 9 + [1] * 7 + [2]], np.int32)


def lru(parameters, x, ids=None, graph=None):
    """From an empty past."""
    first = np.zeros(x.shape[:2], bool) if ids is None else np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    first[:, 0] = True
    state = jnp.zeros((x.shape[0], x.shape[2]), x.dtype if x.dtype != jnp.bfloat16 else jnp.float32)
    return nnx.merge(graph, parameters)(x, jnp.asarray(first), state, None if ids is None else jnp.asarray(ids))


@pytest.mark.parametrize("dtype", numerics.TOLERANCES)
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
def test_values_and_gradients(ids, dtype):
    graph, parameters = small.module(lambda rngs: RGLRU(6, 2, rngs=rngs))
    parameters = jax.tree.map(numerics.representable, parameters)
    random = np.random.default_rng(0)
    x = numerics.normal(random, 2, 20, 6)
    expected = oracles.rg_lru(parameters, x, ids)
    cotangents = numerics.cotangents_like(random, expected)
    reference = numerics.with_gradients(functools.partial(naive.rg_lru, ids=None if ids is None else jnp.asarray(ids)))
    naive_values, gradients = numerics.run(reference, (parameters, x), cotangents, dtype="float64")
    numerics.assert_close(naive_values, expected, 1e-12)
    run = numerics.with_gradients(functools.partial(lru, ids=ids, graph=graph))
    found, found_gradients = numerics.run(run, (parameters, x), cotangents, dtype=dtype)
    tolerance = numerics.TOLERANCES[dtype] * (2 if dtype == "bfloat16" else 1)  # its gates are rounded as well
    numerics.assert_close(found, expected, tolerance)
    numerics.assert_close(found_gradients, numerics.wide(gradients), tolerance)


def test_gradients_are_those_of_finite_differences():
    graph, parameters = small.module(lambda rngs: RGLRU(6, 2, rngs=rngs))
    random = np.random.default_rng(1)
    x, weights = random.standard_normal((2, 20, 6)), random.standard_normal((2, 20, 6))

    def objective(x, *leaves):
        return np.sum(weights * oracles.rg_lru(dict(zip(parameters, leaves, strict=True)), x, IDS)[0])

    run = numerics.with_gradients(lambda parameters, x: lru(parameters, x, IDS, graph)[0])
    _, (gradients, dx) = numerics.run(run, (parameters, x), weights, dtype="float64")
    inputs = (x, *parameters.values())
    for position, gradient in enumerate((dx, *(gradients[name] for name in parameters))):
        directions = [random.standard_normal(y.shape) * (i == position) for i, y in enumerate(inputs)]
        expected = numerics.directional_derivative(objective, inputs, directions)
        assert np.sum(directions[position] * np.asarray(gradient)) == pytest.approx(expected, rel=1e-6)


def test_the_first_token_enters_with_weight_one():
    graph, parameters = small.module(lambda rngs: RGLRU(4, 1, rngs=rngs))
    x = numerics.normal(np.random.default_rng(2), 1, 3, 4)
    ids = np.array([[1, 2, 1]], np.int32)  # three documents of one token each
    h, final = numerics.run(functools.partial(lru, ids=ids, graph=graph), parameters, x, dtype="float64")
    gate = oracles.sigmoid(x @ parameters["input_kernel"][0] + parameters["input_bias"])
    numerics.assert_close((h, final), (gate * x, (gate * x)[:, -1]), 1e-12)


@pytest.mark.parametrize("bias", [-200.0, -18.0, 0.0, 200.0])
def test_gradients_are_finite_at_every_decay(bias):
    """At -200 the gate is 0 and a is exactly 1; at -18 a is close to 1; at 200 a is at its smallest."""
    graph, parameters = nnx.split(RGLRU(4, 2, rngs=nnx.Rngs(0)))
    pure = nnx.to_pure_dict(parameters)
    pure["recurrence_bias"] = jnp.full((4,), bias)
    x = numerics.cast(numerics.normal(np.random.default_rng(3), 1, 30, 4), "float32")
    run = numerics.with_gradients(functools.partial(lru, graph=graph))
    values, gradients = run((pure, x), (np.ones((1, 30, 4)), np.ones((1, 4))))
    assert all(jnp.isfinite(y).all() for y in jax.tree.leaves((values, gradients)))
    assert all(jnp.abs(y).max() < 1e5 for y in jax.tree.leaves(gradients))
    if bias == -200:
        # Only the first token enters, and nothing is forgotten.
        numerics.assert_close(values[0], jnp.repeat(values[0][:, :1], 30, axis=1), 0)


def test_the_decay_at_the_start():
    """a at r = 1 lies in 0.9 .. 0.999, and its square is uniform."""
    layer = RGLRU(8192, 64, rngs=nnx.Rngs(0))
    a = np.exp(-8 * oracles.softplus(np.asarray(layer.decay[...], np.float64)))
    assert 0.9 - 1e-5 < a.min() < 0.901 and 0.9985 < a.max() < 0.999 + 1e-5
    place = (a**2 - 0.81) / (0.999**2 - 0.81)
    numerics.assert_close(np.quantile(place, np.linspace(0.1, 0.9, 9)), np.linspace(0.1, 0.9, 9), 0.03)
