"""Norms over heads against their equations, by the last axis of an array and by tiles as on a TPU."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.heads import GroupNorm, HeadNorm
from jaxlinear.ops import backends
from jaxlinear.ops.heads import unit_length
from jaxlinear.parallel import sharding
from jaxlinear.parallel.operations import scale_heads
from tests import numerics, small
from tests.shards import make_mesh

VIEWS = {"axis": contextlib.nullcontext, "tiles": lambda: backends.use_platform("tpu")}
# B, T, ..., K. A register of 128 channels holds a head, a third of one, four, parts of two, or of three.
SHAPES = [(2, 8, 2, 128), (1, 16, 2, 384), (1, 8, 8, 32), (1, 8, 2, 192), (1, 8, 8, 80), (1, 8, 4, 64)]


def scaled(x, d_y, count):
    """``y = x / r`` with ``r^2 = sum(x^2) / count + 1e-6``, and d_x, ``d_y / r - x sum(x d_y) / (count r^3)``."""
    r = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) / count + 1e-6)
    return x / r, d_y / r - x * np.sum(x * d_y, axis=-1, keepdims=True) / (count * r**3)


def packed(y):
    return y.reshape(*y.shape[:2], -1)


def values_and_gradients(norm, view, arguments, d_y, dtype="float64"):
    with VIEWS[view]():
        return numerics.run(numerics.with_gradients(norm), arguments, d_y, dtype=dtype)


def inputs(shape):
    random = np.random.default_rng(0)
    return 3 * numerics.normal(random, *shape), numerics.normal(random, *shape)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "shape, dtype", [*((shape, "float64") for shape in SHAPES), *((s, "float32") for s in SHAPES[3:])]
)
def test_unit_length(shape, dtype, view):
    x, d_y = inputs(shape)
    y, (d_x,) = values_and_gradients(lambda x: unit_length(x, shape[2]), view, (packed(x),), packed(d_y), dtype)
    numerics.assert_close((y, d_x), tuple(map(packed, scaled(x, d_y, 1))), numerics.TOLERANCES[dtype])


@pytest.mark.parametrize("view", VIEWS)
def test_vectors_of_any_length(view):
    x = inputs((1, 8, 8, 80))[0] * 10.0 ** np.linspace(-2, 15, 8)[:, None, None]
    with VIEWS[view]():
        found = numerics.run(numerics.jit(lambda x: unit_length(x, 8)), packed(x), dtype="float32")
    numerics.assert_close(found, packed(scaled(x, x, 1)[0]), 1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_zeros_have_no_direction(view):
    zeros = np.zeros((1, 8, 128))
    y, (d_x,) = values_and_gradients(lambda x: unit_length(x, 2), view, (zeros,), zeros + 1, "float32")
    assert not y.any() and jnp.isfinite(d_x).all()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_head_norm(shape, view):
    """Weights ``1 + scale``, the same for each head; their gradient is a sum over all of them."""
    x, d_y = inputs(shape)
    scale = numerics.normal(np.random.default_rng(1), shape[-1])
    graph, parameters = small.module(lambda rngs: HeadNorm(shape[-1], epsilon=1e-6, offset=1.0, rngs=rngs))
    norm = lambda scale, x: nnx.merge(graph, parameters | {"scale": scale})(x)  # noqa: E731
    y, (d_scale, d_x) = values_and_gradients(norm, view, (scale, packed(x)), packed(d_y))
    expected, expected_d_x = scaled(x, d_y * (1 + scale), shape[-1])
    numerics.assert_close(y, packed(expected * (1 + scale)), 1e-10)
    numerics.assert_close((d_scale, d_x), (np.sum(expected * d_y, axis=(0, 1, 2)), packed(expected_d_x)), 1e-10)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm(shape, view):
    x, d_y = inputs(shape)
    y, (d_x,) = values_and_gradients(GroupNorm(shape[2], 1e-6), view, (packed(5 + x),), packed(d_y))
    centred = x - x.mean(axis=-1, keepdims=True)
    expected, d_centred = scaled(centred, d_y, shape[-1])
    numerics.assert_close(y, packed(expected), 1e-9)
    numerics.assert_close(d_x, packed(d_centred - d_centred.mean(axis=-1, keepdims=True)), 1e-9)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "shape, dtype", [*((shape, "float64") for shape in SHAPES), *((s, "bfloat16") for s in SHAPES[3:])]
)
def test_scale_heads(shape, dtype, view):
    """Numbers in float32, as time steps are, beside activations in bfloat16."""
    x, d_y = inputs(shape)
    scales = numerics.normal(np.random.default_rng(1), *shape[:3])

    def scaled(x, scales):
        return scale_heads(x, scales.astype(jnp.float32) if dtype == "bfloat16" else scales)

    y, (d_x, d_scales) = values_and_gradients(scaled, view, (packed(x), scales), packed(d_y), dtype)
    assert y.dtype == d_x.dtype == dtype
    expected = packed(x * scales[..., None]), packed(d_y * scales[..., None]), np.sum(x * d_y, axis=-1)
    numerics.assert_close((y, d_x, d_scales), expected, numerics.TOLERANCES[dtype] / 2)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"sequence": 2, "tensor": 2}, {"tensor": 4}])
def test_tiles_on_a_mesh(sizes):
    """With four devices the tiles are not whole: 96 channels each."""
    x, d_y = inputs((2, 16, 4, 96))
    scales = numerics.normal(np.random.default_rng(1), 2, 16, 4)

    def both(x, scales):
        x, scales = (sharding.constrain(y, "batch", "time", "heads") for y in (x, scales))
        found = unit_length(x, 4), scale_heads(x, scales)
        return tuple(sharding.constrain(y, "batch", "time", "heads") for y in found)

    with sharding.use_mesh(make_mesh({"data": 8 // (sizes.get("sequence", 1) * sizes["tensor"])} | sizes)):
        found, gradients = values_and_gradients(both, "tiles", (packed(x), scales), (packed(d_y), packed(d_y)))
    unit, d_x = scaled(x, d_y, 1)
    numerics.assert_close(found, (packed(unit), packed(x * scales[..., None])), 1e-10)
    numerics.assert_close(gradients, (packed(d_x + d_y * scales[..., None]), np.sum(x * d_y, axis=-1)), 1e-10)
