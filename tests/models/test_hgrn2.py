"""HGRN2: its its lower bounds, which depend on all layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models import stacks
from jaxlinear.models.mixers.hgrn2 import HGRN2, lower_bounds
from jaxlinear.models.parameters import describe
from tests import numerics, oracles, small
from tests.mixer_oracles import ORACLES


def test_the_lower_bounds():
    """0, 1/4, 2/4 and 3/4 at the start; for any logits they rise from 0 to below 1."""
    numerics.assert_close(lower_bounds(jnp.zeros((4, 3))), np.repeat(np.arange(4)[:, None] / 4, 3, axis=1), 1e-6)
    logits = 3 * np.random.default_rng(0).standard_normal((6, 50))
    found = np.asarray(numerics.run(lower_bounds, logits, dtype="float64"))
    numerics.assert_close(found, _bounds(logits), 1e-12)
    assert not found[0].any() and (np.diff(found, axis=0) > 0).all() and (found < 1).all()
    assert not lower_bounds(jnp.zeros((1, 3))).any()


def _bounds(logits):
    """For each layer, the sum of the softmax over the layers after the first, up to it."""
    return np.stack(
        [sum((np.exp(logits[i]) for i in range(1, n + 1)), 0 * logits[0]) for n in range(len(logits))]
    ) / np.exp(logits).sum(axis=0)


PATTERN = ("hgrn2", "rg_lru", "hgrn2")
LAYERS = (0, 2, 3, 5, 6)  # of 8; the last is in the remainder
TOKENS = np.random.default_rng(1).integers(0, 31, (2, 9)).astype(np.int32)


def _logits_at(config, parameters):
    """Each layer's mixer parameters, in the order of the layers, with the index of its row of logits."""
    for layer in LAYERS:
        place = stacks.place(config.stacks, layer)
        yield parameters["stacks"][place.stack]["blocks"][place.block]["mixer"], place.repeat


def _oracle(config, parameters):
    bounded = jax.tree.map(np.copy, parameters)
    bounds = _bounds(np.stack([mixer["lower_bound"][at] for mixer, at in _logits_at(config, parameters)]))
    for (mixer, at), bound in zip(_logits_at(config, bounded), bounds, strict=True):
        mixer["lower_bound"][at] = bound
    return oracles.language_model(config, bounded, TOKENS, mixers=ORACLES)


@functools.cache
def _model():
    config = small.config(pattern=PATTERN, key_width=8, dtype="float64", remat="none")
    architecture = describe(config)
    return config, architecture, small.parameters(architecture.shapes)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unstacked"])
def test_a_layer_has_the_bound_of_its_place_in_the_model(stacked):
    """Scanned, in the remainder, and when the periods are separate modules."""
    config, architecture, parameters = _model()

    def run(parameters):
        model = architecture.bind(parameters)
        return (model if stacked else model.unstacked())(TOKENS)[0]

    found = numerics.run(numerics.jit(run), parameters, dtype="float64")
    numerics.assert_close(found, _oracle(config, parameters), 1e-10)


@pytest.mark.parametrize("num_layers", [1, 3], ids=["rest", "periods"])
def test_models_without_the_one_or_the_other(num_layers):
    model = small.bound({"pattern": ("rg_lru", "hgrn2"), "num_layers": num_layers + 1, "key_width": 8})[-1]
    before = model.stacks[0].blocks[1].mixer.lower_bound[...] + 0
    assert jnp.isfinite(numerics.jit(lambda: model(TOKENS)[0])()).all()
    assert np.array_equal(model.stacks[0].blocks[1].mixer.lower_bound[...], before)  # the model itself keeps its logits


def test_gradients_go_to_the_logits_of_all_layers():
    config, architecture, parameters = _model()
    weights = np.random.default_rng(2).standard_normal((2, 9, 31))

    def value(parameters, weights):
        return jnp.sum(weights * architecture.bind(parameters)(TOKENS)[0])

    gradients = numerics.run(numerics.jit(jax.grad(value)), parameters, weights, dtype="float64")
    random = np.random.default_rng(3)
    found = [np.asarray(mixer["lower_bound"])[at] for mixer, at in _logits_at(config, gradients)]
    assert all(np.abs(row).max() > 0 for row in found)
    directions = [random.standard_normal(row.shape) for row in found]

    def moved(step):
        values = jax.tree.map(np.copy, parameters)
        for (mixer, at), direction in zip(_logits_at(config, values), directions, strict=True):
            mixer["lower_bound"][at] += step * direction
        return np.sum(weights * _oracle(config, values))

    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert sum(np.sum(d * g) for d, g in zip(directions, found, strict=True)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_a_gate_that_is_shut_or_open(bound):
    """At -200, all but the bound's share is forgotten, and at 200, nothing; values and gradients stay finite."""
    graph, parameters = small.module(lambda rngs: HGRN2(small.config(key_width=8), rngs=rngs))
    x = numerics.normal(np.random.default_rng(4), 1, 6, 16)
    x[..., 0] = [-200, 200, 200, -200, 200, -200]
    parameters["forget"]["kernel"] = np.zeros((16, 16))
    parameters["forget"]["kernel"][0] = 1
    parameters["lower_bound"] = np.full(16, bound)
    expected = ORACLES["hgrn2"](parameters, x, None, small.config(key_width=8))
    run = numerics.with_gradients(lambda parameters, x: nnx.merge(graph, parameters)(x)[0])
    found, gradients = numerics.run(run, (parameters, x), np.ones(x.shape), dtype="float32")
    numerics.assert_close(found, expected, 1e-5)
    assert all(jnp.isfinite(y).all() for y in jax.tree.leaves(gradients))
