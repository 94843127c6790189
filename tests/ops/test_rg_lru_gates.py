"""The RG-LRU's gates: products against a loop over tokens and channels, the bounded root, and what is refused."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import log_once
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, rg_lru_gates
from jaxlinear.ops.rg_lru.gates import bounded_sqrt, choose
from tests import naive, numerics, oracles


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


@pytest.mark.parametrize("dtype", numerics.TOLERANCES)
def test_values_and_gradients(dtype):
    inputs, first = draw(2, 12, 3, 4)
    expected = expected_values(*inputs, first)
    cotangents = numerics.cotangents_like(np.random.default_rng(0), expected)
    reference = numerics.with_gradients(lambda *inputs: naive.rg_lru_gates(*inputs, first))
    values, gradients = numerics.run(reference, inputs, cotangents, dtype="float64")
    numerics.assert_close(values, expected, 1e-12)

    run = numerics.with_gradients(lambda *inputs: rg_lru_gates(*inputs, first, backend="products"))
    found, found_gradients = numerics.run(run, inputs, cotangents, dtype=dtype)
    assert found[0].dtype == found[1].dtype == ("float64" if dtype == "float64" else "float32")
    assert {y.dtype.name for y in found_gradients} == {dtype}
    tolerance = numerics.TOLERANCES[dtype] * (2 if dtype == "bfloat16" else 1)  # its gates are rounded as well
    numerics.assert_close(found, expected, tolerance)
    numerics.assert_close(found_gradients, numerics.wide(gradients), tolerance)


def test_the_slope_of_the_root_is_bounded():
    x = jnp.array([0.0, 1e-8, 2.5e-7, 1e-4, 0.25, 1.0])
    assert np.array_equal(bounded_sqrt(x), jnp.sqrt(x))
    slopes = jax.vmap(jax.grad(bounded_sqrt))(x)
    numerics.assert_close(slopes, np.array([1000, 1000, 1000, 50, 1, 0.5]), 1e-6)
    numerics.assert_close(slopes[3:], np.array([50, 1, 0.5]), 1e-6)


def test_auto_takes_the_kernel_on_a_tpu_where_it_runs(caplog):
    x, few, kernel = jnp.ones((1, 9, 256)), jnp.ones((1, 8, 256)), jnp.ones((2, 128, 128))
    wide, one_block = jnp.ones((1, 9, 4096)), jax.ShapeDtypeStruct((1, 4096, 4096), jnp.float32)
    with jax.enable_x64(True):
        double = jnp.ones((1, 9, 256), jnp.float64)
    assert numerics.form(choose, "auto", x, kernel) == "products"
    assert numerics.form(choose, "pallas", x, kernel) == "pallas"
    log_once._logged.clear()
    with backends.use_platform("tpu", "some kind"), caplog.at_level(logging.INFO, logger="jaxlinear"):
        assert (
            numerics.form(choose, "auto", x, kernel)
            == numerics.form(choose, "auto", x.astype(jnp.bfloat16), kernel)
            == "pallas"
        )
        assert numerics.form(choose, "auto", few, kernel) == numerics.form(choose, "products", x, kernel) == "products"
        assert not caplog.records
        for y, kernels, why in (
            (double, kernel, "takes float32 and bfloat16, not float64"),
            (wide, one_block, "has no room in VMEM for blocks of 4096 channels among 4096"),
            (x[..., :192], kernel[:1], "needs whole blocks on each device, and 192 channels are no multiple of 128"),
        ):
            assert numerics.form(choose, "auto", y, kernels) == "products"
            assert caplog.messages[-1] == f"rg_lru_gates runs as 'products', not as a kernel: the kernel {why}"
            with pytest.raises(UserError, match=re.escape(f"{why}; use backend='products'")):
                numerics.form(choose, "pallas", y, kernels)
        with backends.use_kernels(False):
            assert numerics.form(choose, "auto", x, kernel) == "products"
    with backends.use_platform("gpu", "some kind"):
        assert numerics.form(choose, "auto", x, kernel) == "products"
        with pytest.raises(UserError, match=r"the kernel is for TPUs; use backend='products'"):
            numerics.form(choose, "pallas", x, kernel)


@pytest.mark.parametrize(
    "place, shape, dtype, message",
    [
        (0, (2, 12), "float32", r"x is \(2, 12\); it must be \[B, T, R\]"),
        (0, (2, 12, 12), "int32", r"x has dtype int32; it must be real"),
        (
            1,
            (2, 4, 4),
            "float32",
            r"recurrence_kernel is \(2, 4, 4\); for x \(2, 12, 12\) it must be \[N, K, K\] with N K = 12",
        ),
        (3, (4, 3, 3), "float32", r"input_kernel \(4, 3, 3\) does not have recurrence_kernel's shape \(3, 4, 4\)"),
        (4, (1,), "float32", r"input_bias is \(1,\), not \[R\] = \(12,\)"),
        (6, (2, 12), "int32", r"first is int32 \(2, 12\), not bool \[B, T\] = \(2, 12\)"),
        (6, (2, 1), "bool", r"first is bool \(2, 1\), not bool"),
    ],
)
def test_arguments_that_do_not_fit(place, shape, dtype, message):
    inputs, first = draw(2, 12, 3, 4)
    arguments = [*numerics.cast(inputs, "float32"), jnp.asarray(first)]
    arguments[place] = jnp.zeros(shape, dtype)
    with pytest.raises(UserError, match=f"rg_lru_gates: {message}"):
        rg_lru_gates(*arguments)
    with pytest.raises(UserError, match=r"rg_lru_gates has no backend 'chunked'; it has 'auto', 'products', 'pallas'"):
        rg_lru_gates(*numerics.cast(inputs, "float32"), jnp.asarray(first), backend="chunked")
