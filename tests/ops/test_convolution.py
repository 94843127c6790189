"""causal_convolution: cases for the laws, complex numbers, the state, and what is rounded."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlinear.ops import causal_convolution
from tests import naive, numerics
from tests.ops import cases

# name: B, T, D, width, segments
CASES = {
    "one_token": (3, 1, 5, 4, True),
    "shorter_than_the_kernel": (3, 2, 2, 4, True),
    "short": (1, 7, 1, 4, True),
    "width_1": (3, 7, 2, 1, True),
    "width_2": (1, 64, 3, 2, False),
    "packed": (3, 100, 2, 4, True),
    "long": (1, 257, 3, 4, True),
}


@functools.cache
def case(name):
    batch, length, channels, width, packed = CASES[name]
    random = np.random.default_rng(length)
    shapes = ((batch, length, channels), (width, channels), (channels,), (batch, width - 1, channels))
    inputs = tuple(numerics.normal(random, *shape) for shape in shapes)
    ids = cases.documents(random, batch, length, 0.2) if packed else None
    return cases.expected(random, "causal_convolution", inputs, ids)


RUNS = [(name, dtype, "auto") for name, dtype in numerics.each_dtype(CASES, "short", "packed", "long")]


def options(name, backend):
    return {}


@pytest.mark.parametrize("complex_weights", [False, True])
def test_complex_inputs(complex_weights):
    """With real or complex filters."""
    random = np.random.default_rng(4)
    x, state = (numerics.normal(random, *shape, complex_=True) for shape in ((2, 9, 3), (2, 3, 3)))
    kernel, bias = (numerics.normal(random, *shape, complex_=complex_weights) for shape in ((4, 3), (3,)))
    ids = np.cumsum(random.random((2, 9)) < 0.2, axis=1, dtype=np.int32)
    cotangents = tuple(numerics.normal(random, *shape, complex_=True) for shape in (x.shape, state.shape))

    def reference(x, kernel, bias, state):
        kernel, bias = (y.astype(x.dtype) for y in (kernel, bias))
        return naive.causal_convolution(x, kernel, bias, state, ids)

    arguments = (x, kernel, bias, state), cotangents
    expected = numerics.wide(numerics.run(numerics.with_gradients(reference), *arguments, dtype="float64"))
    op = numerics.with_gradients(functools.partial(causal_convolution, segment_ids=ids))
    for dtype in ("float64", "float32"):
        numerics.assert_close(numerics.run(op, *arguments, dtype=dtype), expected, numerics.TOLERANCES[dtype])


def test_the_state_holds_the_inputs_of_the_last_document():
    """An id used again names another document; a document shorter than the kernel has zeros before it."""
    x = np.arange(1.0, 7.0, dtype=np.float32)[None, :, None]
    kernel, state = np.ones((4, 1), np.float32), np.full((1, 3, 1), 10, np.float32)
    y, final = causal_convolution(x, kernel, state=state, segment_ids=np.array([[1, 1, 2, 2, 1, 1]], np.int32))
    assert y[0, :, 0].tolist() == [31, 23, 3, 7, 5, 11]
    assert final[0, :, 0].tolist() == [0, 5, 6]
    one_each, _ = causal_convolution(x, kernel, state=state, segment_ids=np.arange(6, dtype=np.int32)[None])
    assert one_each[0, :, 0].tolist() == [31, 2, 3, 4, 5, 6]


def test_gradients_of_the_parameters_are_summed_in_float32():
    """100,000 equal terms: a bfloat16 sum stops growing at 256."""
    x = np.ones((1, 100_000, 1), ml_dtypes.bfloat16)

    @numerics.jit
    def gradients(kernel, bias):
        total = lambda *p: jnp.sum(causal_convolution(x, *p)[0].astype(jnp.float32))  # noqa: E731
        return jax.grad(total, argnums=(0, 1))(kernel, bias)

    kernel, bias = gradients(np.ones((2, 1), np.float32), np.ones(1, np.float32))
    assert kernel[:, 0].tolist() == [99_999, 100_000]
    assert bias.tolist() == [100_000]


def test_bfloat16_is_rounded_once():
    """Every value and gradient is within half a unit in the last place of its float64 counterpart."""
    inputs, (dy, _), ids, _, _ = case("packed")
    outputs = lambda op: numerics.with_gradients(lambda *inputs: op(*inputs)[0])  # noqa: E731
    reference = outputs(functools.partial(naive.causal_convolution, ids=ids))
    expected = numerics.wide(numerics.run(reference, inputs, dy, dtype="float64"))
    op = outputs(functools.partial(causal_convolution, segment_ids=ids))
    found = numerics.run(op, inputs, dy, dtype="bfloat16")
    for ours, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.all(np.abs(numerics.wide(ours) - exact) <= 2.0**-8 * np.abs(exact) + 1e-6 * np.abs(exact).max())


def test_filters_are_not_rounded_to_the_inputs():
    """In training, inputs are bfloat16 and filters float32: one product, rounded once, and its unrounded gradient."""
    random = np.random.default_rng(3)
    x, kernel = numerics.normal(random, 1, 50, 4), np.float32(random.standard_normal((1, 4)))

    @numerics.jit
    def run(x, kernel):
        y, pullback = jax.vjp(lambda kernel: causal_convolution(x, kernel)[0], kernel)
        return y, pullback(x)[0]

    y, d_kernel = run(jnp.asarray(x, jnp.bfloat16), kernel)
    assert np.all(np.abs(numerics.wide(y) - kernel * x) <= 2.0**-8 * np.abs(kernel * x))
    numerics.assert_close(d_kernel, np.sum(x * x, axis=1), 1e-6)


def test_gradients_keep_the_inputs_alone():
    """Nothing else as long as the sequence is kept."""
    arrays = [np.ones(shape, np.float32) for shape in ((1, 64, 8), (4, 8), (8,), (1, 3, 8))]
    _, pullback = jax.vjp(lambda *x: causal_convolution(*x, segment_ids=np.zeros((1, 64), np.int32)), *arrays)
    assert [y.shape for y in jax.tree.leaves(pullback) if y.dtype == np.float32 and y.size >= 64] == [(1, 64, 8)]
