"""The RG-LRU: its gates, alone and with the recurrence, against a loop over tokens; and when its kernels are chosen."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import log_once
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, rg_lru, rg_lru_gates
from jaxlinear.ops.rg_lru import gates, op
from tests import naive, numerics
from tests.ops import test_rg_lru_gates


def draw(batch, length, blocks, block):
    """``(inputs with a state, first, ids)``; in some rows the first document goes on from the state."""
    inputs, _ = test_rg_lru_gates.draw(batch, length, blocks, block)
    random = np.random.default_rng(batch + length)
    ids = np.cumsum(random.random((batch, length)) < 0.1, axis=1).astype(np.int32)
    first = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    first[:, 0] = np.arange(batch) % 2 == 1
    state = numerics.normal(random, batch, blocks * block) * ~first[:, :1]
    return (*inputs, numerics.representable(state)), first, ids


def reference(first, ids):
    def run(*inputs):
        *of_gates, state = inputs
        return naive.linear_recurrence(*naive.rg_lru_gates(*of_gates, first), state, ids)

    return run


def operation(first, ids, backend):
    def run(*inputs):
        *of_gates, state = inputs
        return rg_lru(*of_gates, jnp.asarray(first), state, segment_ids=ids, backend=backend)

    return run


def expected_values(inputs, first, ids):
    *of_gates, state = inputs
    a, u = test_rg_lru_gates.expected_values(*of_gates, first)
    h = np.zeros(u.shape)
    for b in range(len(h)):
        before = state[b]
        for t in range(h.shape[1]):
            if t and ids[b, t] != ids[b, t - 1]:
                before = np.zeros_like(before)
            h[b, t] = before = a[b, t] * before + u[b, t]
    return h, h[:, -1]


@pytest.mark.parametrize("dtype", numerics.TOLERANCES)
@pytest.mark.parametrize("whole", [True, False], ids=["rg_lru", "rg_lru_gates"])
def test_values_and_gradients(whole, dtype):
    inputs, first, ids = draw(2, 12, 3, 4)
    if whole:
        expected, of_oracle, run = (
            expected_values(inputs, first, ids),
            reference(first, ids),
            operation(first, ids, "separate"),
        )
    else:
        inputs = inputs[:-1]
        expected = test_rg_lru_gates.expected_values(*inputs, first)
        of_oracle = lambda *inputs: naive.rg_lru_gates(*inputs, first)  # noqa: E731
        run = lambda *inputs: rg_lru_gates(*inputs, first, backend="products")  # noqa: E731
    cotangents = numerics.cotangents_like(np.random.default_rng(0), expected)
    values, gradients = numerics.run(numerics.with_gradients(of_oracle), inputs, cotangents, dtype="float64")
    numerics.assert_close(values, expected, 1e-12)
    found, found_gradients = numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype=dtype)
    assert found[0].dtype == found[1].dtype == ("float64" if dtype == "float64" else "float32")
    assert {y.dtype.name for y in found_gradients} == {dtype}
    tolerance = numerics.TOLERANCES[dtype] * (2 if dtype == "bfloat16" else 1)  # its gates are rounded as well
    numerics.assert_close(found, expected, tolerance)
    numerics.assert_close(found_gradients, numerics.wide(gradients), tolerance)


@pytest.mark.parametrize(
    "name, choose, plain, on_gpu",
    [("rg_lru_gates", gates.choose, "products", "products"), ("rg_lru", op.choose, "separate", "pallas")],
)
def test_auto_takes_the_kernel_where_it_runs(caplog, name, choose, plain, on_gpu):
    x, few, kernel = jnp.ones((1, 9, 256)), jnp.ones((1, 8, 256)), jnp.ones((2, 128, 128))
    form = functools.partial(numerics.form, choose)
    with jax.enable_x64(True):
        double = jnp.ones((1, 9, 256), jnp.float64)
    assert form("auto", x, kernel) == plain and form("pallas", x, kernel) == "pallas"
    log_once._logged.clear()
    refused = [(x[..., :192], kernel[:1], "needs whole blocks on each device, and 192 channels are no multiple of 128")]
    if name == "rg_lru_gates":
        wide, one_block = jnp.ones((1, 9, 4096)), jax.ShapeDtypeStruct((1, 4096, 4096), jnp.float32)
        refused += [
            (double, kernel, "takes float32 and bfloat16, not float64"),
            (wide, one_block, "has no room in VMEM for blocks of 4096 channels among 4096"),
        ]
    with backends.use_platform("tpu", "some kind"), caplog.at_level(logging.INFO, logger="jaxlinear"):
        assert form("auto", x, kernel) == form("auto", x.astype(jnp.bfloat16), kernel) == "pallas"
        assert form("auto", few, kernel) == form(plain, x, kernel) == plain
        assert not caplog.records
        for y, kernels, why in refused:
            assert form("auto", y, kernels) == plain
            assert caplog.messages[-1] == f"{name} runs as '{plain}', not as a kernel: the kernel {why}"
            with pytest.raises(UserError, match=re.escape(f"{name}: the kernel {why}; use backend='{plain}'")):
                form("pallas", y, kernels)
        with backends.use_kernels(False):
            assert form("auto", x, kernel) == plain
    with backends.use_platform("gpu", "some kind"):
        assert form("auto", x, kernel) == on_gpu and form("auto", few, kernel) == plain
        if name == "rg_lru_gates":
            with pytest.raises(UserError, match="the kernel is for TPUs; use backend='products'"):
                form("pallas", x, kernel)
