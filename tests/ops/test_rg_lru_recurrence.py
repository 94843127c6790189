"""The RG-LRU: gates and recurrence against a loop over tokens, when its kernel is chosen, and what is refused."""

import logging
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import log_once
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, rg_lru
from jaxlinear.ops.rg_lru.op import choose
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
def test_values_and_gradients(dtype):
    inputs, first, ids = draw(2, 12, 3, 4)
    expected = expected_values(inputs, first, ids)
    cotangents = numerics.cotangents_like(np.random.default_rng(0), expected)
    values, gradients = numerics.run(
        numerics.with_gradients(reference(first, ids)), inputs, cotangents, dtype="float64"
    )
    numerics.assert_close(values, expected, 1e-12)

    run = numerics.with_gradients(operation(first, ids, "separate"))
    found, found_gradients = numerics.run(run, inputs, cotangents, dtype=dtype)
    assert found[0].dtype == found[1].dtype == ("float64" if dtype == "float64" else "float32")
    tolerance = numerics.TOLERANCES[dtype] * (2 if dtype == "bfloat16" else 1)  # its gates are rounded as well
    numerics.assert_close(found, expected, tolerance)
    numerics.assert_close(found_gradients, numerics.wide(gradients), tolerance)


def test_auto_takes_the_kernel_where_it_runs(caplog):
    x, few, kernel = jnp.ones((1, 9, 256)), jnp.ones((1, 8, 256)), jnp.ones((2, 128, 128))
    assert numerics.form(choose, "auto", x, kernel) == "separate"
    assert numerics.form(choose, "pallas", x, kernel) == "pallas"
    log_once._logged.clear()
    with backends.use_platform("tpu", "some kind"), caplog.at_level(logging.INFO, logger="jaxlinear"):
        assert (
            numerics.form(choose, "auto", x, kernel)
            == numerics.form(choose, "auto", x.astype(jnp.bfloat16), kernel)
            == "pallas"
        )
        assert numerics.form(choose, "auto", few, kernel) == numerics.form(choose, "separate", x, kernel) == "separate"
        assert not caplog.records
        why = "needs whole blocks on each device, and 192 channels are no multiple of 128"
        assert numerics.form(choose, "auto", x[..., :192], kernel[:1]) == "separate"
        assert caplog.messages == [f"rg_lru runs as 'separate', not as a kernel: the kernel {why}"]
        with pytest.raises(UserError, match=re.escape(f"rg_lru: the kernel {why}; use backend='separate'")):
            numerics.form(choose, "pallas", x[..., :192], kernel[:1])
        with backends.use_kernels(False):
            assert numerics.form(choose, "auto", x, kernel) == "separate"
    with backends.use_platform("gpu", "some kind"):
        assert (
            numerics.form(choose, "auto", x, kernel) == "pallas"
            and numerics.form(choose, "auto", few, kernel) == "separate"
        )


@pytest.mark.parametrize("backend", ["separate", "pallas"])
def test_arguments_that_do_not_fit(backend):
    inputs, first, ids = draw(2, 12, 3, 4)
    *of_gates, state = numerics.cast(inputs, "float32")
    first = jnp.asarray(first)
    with pytest.raises(UserError, match=r"the initial state is \(2, 11\), not \[B, "):
        rg_lru(*of_gates, first, state[:, 1:], backend=backend)
    with pytest.raises(UserError, match=r"segment_ids"):
        rg_lru(*of_gates, first, state, segment_ids=ids[:, 1:], backend=backend)
    with pytest.raises(UserError, match=r"first is bool \(2, 11\), not bool \[B, T\] = \(2, 12\)"):
        rg_lru(*of_gates, first[:, 1:], state, backend=backend)
    with pytest.raises(UserError, match=r"rg_lru has no backend 'chunked'; it has 'auto', 'separate', 'pallas'"):
        rg_lru(*of_gates, first, state, backend="chunked")
