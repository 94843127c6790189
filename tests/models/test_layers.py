"""The parts of a block against their equations, and the precision in which their gradients are summed."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    from_complex,
    to_complex,
)
from jaxlinear.models.short_convolution import ShortConvolution
from jaxlinear.ops import backends, rotary
from tests import numerics, oracles, small


def check(make, oracle, x, dtype):
    graph, parameters = small.module(make)
    run = numerics.jit(lambda parameters, x: nnx.merge(graph, parameters)(x))
    with jax.enable_x64(dtype == "float64"):
        found = run(numerics.cast(parameters, "float64" if dtype == "float64" else "float32"), numerics.cast(x, dtype))
    numerics.assert_close(found, oracle(parameters, x), numerics.TOLERANCES[dtype])
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", numerics.TOLERANCES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias, dtype):
    x = numerics.normal(np.random.default_rng(0), 2, 5, 6)
    check(lambda rngs: Linear(6, 7, axes=(None, None), bias=bias, rngs=rngs), oracles.linear, x, dtype)


@pytest.mark.parametrize("dtype", numerics.TOLERANCES)
def test_rms_norm(dtype):
    x = 7 * numerics.normal(np.random.default_rng(1), 2, 5, 6)
    check(lambda rngs: RMSNorm(6, rngs=rngs), oracles.rms_norm, x, dtype)


def test_rms_norm_in_bfloat16_is_rounded_once():
    x = 8 * numerics.normal(np.random.default_rng(1), 2, 50, 64)
    graph, parameters = small.module(lambda rngs: RMSNorm(64, rngs=rngs))
    run = numerics.jit(lambda parameters, x: nnx.merge(graph, parameters)(x))
    found = numerics.wide(run(numerics.cast(parameters, "float32"), numerics.cast(x, "bfloat16")))
    expected = oracles.rms_norm(parameters, x)
    assert np.max(np.abs(found - expected) / np.abs(expected)) < 1.01 * 2**-8


def test_the_activation_after_a_convolution_is_rounded_once():
    """In bfloat16, with a filter that passes the present token through."""
    layer = ShortConvolution(8, 3, axis=None, feeds_kernel=True, rngs=nnx.Rngs(0))
    layer.convolution_kernel[...] = jnp.eye(3)[:, 2:] * jnp.ones((1, 8))
    x = numerics.normal(np.random.default_rng(1), 2, 200, 8)
    found, _ = numerics.jit(lambda x: layer(x, segment_ids=None, state=None))(numerics.cast(x, "bfloat16"))
    expected = oracles.silu(x)
    assert np.max(np.abs(numerics.wide(found) - expected) / np.abs(expected)) < 1.01 * 2**-8


def test_products_with_complex_kernels_are_summed_in_float32():
    random = np.random.default_rng(5)
    x, kernel = numerics.normal(random, 2, 3, 40), numerics.normal(random, 2, 40, 6)
    expected = x @ (kernel[0] + 1j * kernel[1])
    found = to_complex(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.float32))
    assert found.dtype == jnp.complex64
    numerics.assert_close(found, expected, 1e-6)
    h = numerics.normal(random, 2, 3, 40, complex_=True)
    found = from_complex(jnp.asarray(h, jnp.complex64), jnp.asarray(kernel, jnp.float32), jnp.bfloat16)
    assert found.dtype == jnp.float32
    numerics.assert_close(found, (h @ (kernel[0] + 1j * kernel[1])).real, 1e-6)


def test_rms_norm_without_an_offset():
    """Its scale is like Llama's weight: the result is as with an offset and a scale that is 1 less. It begins at 1."""
    x = numerics.normal(np.random.default_rng(1), 2, 5, 6)

    def oracle(parameters, x):
        return oracles.rms_norm({"scale": parameters["scale"] - 1}, x)

    check(lambda rngs: RMSNorm(6, offset=0.0, rngs=rngs), oracle, x, "float64")
    assert (RMSNorm(6, offset=0.0, rngs=nnx.Rngs(0)).scale[...] == 1).all()


def test_rms_norm_of_zeros_is_zeros():
    norm = RMSNorm(4, rngs=nnx.Rngs(0))
    assert not norm(jnp.zeros((1, 1, 4))).any()
    assert jnp.isfinite(jax.grad(lambda x: jnp.sum(norm(x)))(jnp.zeros((1, 1, 4)))).all()


@pytest.mark.parametrize("dtype", numerics.TOLERANCES)
def test_gated_mlp(dtype):
    x = numerics.normal(np.random.default_rng(2), 2, 5, 16)
    check(lambda rngs: GatedMLP(small.config(), rngs=rngs), oracles.gated_mlp, x, dtype)


def test_a_gated_mlp_at_the_start():
    """Variances of 1 / fan-in, and 2 / layers of that for the map that ends the residual branch."""
    mlp = GatedMLP(small.config(width=64, num_layers=8), rngs=nnx.Rngs(0))
    for name, inverse in {"gate": 64, "up": 64, "down": 128 * 8 / 2}.items():
        np.testing.assert_allclose(np.std(getattr(mlp, name).kernel[...]), inverse**-0.5, rtol=0.05, err_msg=name)
        assert not np.any(getattr(mlp, name).bias[...])


def turned(**frequencies):
    return lambda x, positions: rotary.turn(x, positions, rotary.frequencies_of(x.shape[-1], **frequencies))


@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.5, 1.0])
def test_rotary(fraction):
    """0.4 of 8 channels are 3, of which one pair is rotated."""
    random = np.random.default_rng(3)
    x, positions = numerics.normal(random, 2, 5, 3, 8), random.integers(0, 3000, (2, 5)).astype(np.int32)
    found = numerics.run(turned(fraction=fraction), x, positions, dtype="float32")
    numerics.assert_close(found, oracles.rotary(x, positions, fraction=fraction), 5e-4)
    unturned = 8 - {0.0: 0, 0.4: 2, 0.5: 4, 1.0: 8}[fraction]
    assert np.array_equal(found[..., 8 - unturned :], x[..., 8 - unturned :].astype(np.float32))


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_rotary_scaling(scaling):
    """Waves of 6 to 17,000 tokens: some below a quarter of the context, some beyond it, some between."""
    random = np.random.default_rng(5)
    x, positions = numerics.normal(random, 2, 5, 1, 16), random.integers(0, 3000, (2, 5)).astype(np.int32)
    changes = {"fraction": 1.0, "base": 5000.0, "scaling": scaling, "context": 800}
    found = numerics.run(turned(**changes), x, positions, dtype="float32")
    numerics.assert_close(found, oracles.rotary(x, positions, **changes), 5e-4)
    frequencies = [
        rotary.frequencies_of(16, fraction=1.0, base=5000.0, **x) for x in ({}, {"scaling": 8.0, "context": 800})
    ]
    ratios = frequencies[0] / frequencies[1]
    assert (ratios == 1).sum() == 4 and np.isclose(ratios, 8).sum() == 3 and ((ratios > 1.01) & (ratios < 7)).sum() == 1


def test_rotary_in_bfloat16():
    """The angles are not rounded: at position 3,000 bfloat16 would put them off by up to 8 radians."""
    random = np.random.default_rng(3)
    x, positions = numerics.normal(random, 1, 50, 1, 8), random.integers(2000, 3000, (1, 50)).astype(np.int32)
    found = numerics.run(turned(fraction=1.0), x, positions, dtype="bfloat16")
    assert found.dtype == jnp.bfloat16
    numerics.assert_close(found, oracles.rotary(x, positions, fraction=1.0), 1e-2)


@pytest.mark.parametrize("fraction", [0.4, 1.0])
def test_rotary_on_a_tpu(fraction):
    """There with a product, exact in bfloat16: values, channels that do not turn, and the gradient, which turns back."""
    random = np.random.default_rng(6)
    x, weights = (numerics.normal(random, 2, 50, 3, 16) for _ in range(2))
    positions = random.integers(0, 3000, (2, 50)).astype(np.int32)
    turn = lambda x: turned(fraction=fraction)(x, positions)  # noqa: E731

    def both(x, weights):
        y, pullback = jax.vjp(turn, x)
        return y, *pullback(weights)

    given = [numerics.cast(y, "bfloat16") for y in (x, weights)]
    with backends.use_platform("tpu"):
        assert "dot_general" in str(jax.make_jaxpr(turn)(given[0]))
        y, d_x = jax.jit(both)(*given)
    for found, expected in ((y, (x, positions)), (d_x, (weights, -positions))):
        assert found.dtype == jnp.bfloat16
        numerics.assert_close(found, oracles.rotary(*expected, fraction=fraction), 1e-2)
    rest = 2 * (int(16 * fraction) // 2)
    assert np.array_equal(y[..., rest:], given[0][..., rest:])


def test_rotary_at_a_million():
    """There a float32 product of position and frequency is off by up to 0.06 radians."""
    random = np.random.default_rng(4)
    x, positions = numerics.normal(random, 1, 50, 1, 8), random.integers(900_000, 1_000_000, (1, 50)).astype(np.int32)
    found = numerics.run(turned(fraction=1.0), x, positions, dtype="float32")
    numerics.assert_close(found, oracles.rotary(x, positions, fraction=1.0), 1e-3)


def test_gradient_of_a_bias_is_summed_in_float32():
    """100,000 equal terms: a bfloat16 sum stops growing at 256."""
    graph, parameters = nnx.split(Linear(1, 1, axes=(None, None), rngs=nnx.Rngs(0)))
    x = np.ones((1, 100_000, 1), ml_dtypes.bfloat16)

    @numerics.jit
    def gradient(parameters):
        return jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x).astype(jnp.float32)))(parameters)

    assert nnx.to_pure_dict(gradient(parameters))["bias"].tolist() == [100_000]
