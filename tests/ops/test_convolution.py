"""causal_convolution against the step-by-step oracle, its gradients and its laws."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlinear.errors import UserError
from jaxlinear.ops import causal_convolution
from tests import naive, numerics, oracles

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
    ids = np.cumsum(random.random((batch, length)) < 0.2, axis=1, dtype=np.int32) % 2 if packed else None
    outputs = oracles.causal_convolution(*inputs, ids)
    cotangents = numerics.cotangents_like(random, outputs)
    reference = numerics.with_gradients(functools.partial(naive.causal_convolution, ids=ids))
    naive_outputs, gradients = numerics.run(reference, inputs, cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return inputs, cotangents, ids, outputs, numerics.wide(gradients)


@pytest.mark.parametrize("name, dtype", numerics.each_dtype(CASES, "short", "packed", "long"))
def test_values_and_gradients(name, dtype):
    inputs, cotangents, ids, outputs, gradients = case(name)
    op = functools.partial(causal_convolution, segment_ids=ids)
    found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert found[0].dtype == found[1].dtype == dtype


def test_gradients_are_those_of_finite_differences():
    random = np.random.default_rng(0)
    inputs = tuple(random.standard_normal(shape) for shape in ((1, 6, 2), (3, 2), (2,), (1, 2, 2)))
    ids = np.array([[1, 1, 1, 2, 2, 1]], np.int32)
    weights = tuple(random.standard_normal(shape) for shape in ((1, 6, 2), (1, 2, 2)))

    def objective(*inputs):
        return sum(np.sum(w * y) for w, y in zip(weights, oracles.causal_convolution(*inputs, ids), strict=True))

    op = functools.partial(causal_convolution, segment_ids=ids)
    _, gradients = numerics.run(numerics.with_gradients(op), inputs, weights, dtype="float64")
    directions = [random.standard_normal(y.shape) for y in inputs]
    expected = numerics.directional_derivative(objective, inputs, directions)
    found = sum(np.sum(d * np.asarray(g)) for d, g in zip(directions, gradients, strict=True))
    assert found == pytest.approx(expected, rel=1e-6)


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


def test_complex_weights_of_real_inputs_are_refused():
    """Their imaginary parts would be dropped."""
    arrays = {"x": (1, 5, 2), "kernel": (3, 2), "bias": (2,), "state": (1, 2, 2)}
    given = {name: np.ones(shape, np.float32) for name, shape in arrays.items()}
    for name in ("kernel", "bias", "state"):
        with pytest.raises(UserError, match=f"the {name} is complex, x is real"):
            causal_convolution(**given | {name: given[name].astype(np.complex64)})


def test_no_state_is_zeros_and_no_bias_is_none():
    random = np.random.default_rng(1)
    x, kernel = (numerics.cast(numerics.normal(random, *shape), "float32") for shape in ((2, 5, 3), (4, 3)))
    found = causal_convolution(x, kernel)
    numerics.assert_close(found, oracles.causal_convolution(numerics.wide(x), numerics.wide(kernel)), 1e-6)


OP = numerics.jit(lambda x, kernel, state, ids: causal_convolution(x, kernel, None, state, segment_ids=ids))
LENGTH = 12
some_ids = st.lists(st.integers(0, 2), min_size=LENGTH, max_size=LENGTH).map(lambda ids: np.array([ids], np.int32))
law = settings(max_examples=15, deadline=None, derandomize=True)


def law_inputs(seed):
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal(shape) for shape in ((1, LENGTH, 2), (4, 2), (1, 3, 2)))


@given(seed=st.integers(0, 1000), ids=some_ids, cut=st.sampled_from([1, 5, 11]))
@law
def test_a_run_cut_in_two_is_one_run(seed, ids, cut):
    x, kernel, state = law_inputs(seed)
    ids[:, cut] = ids[:, cut - 1]  # the state passed on belongs to the next token's document
    whole = numerics.run(OP, x, kernel, state, ids, dtype="float64")
    first, middle = numerics.run(OP, x[:, :cut], kernel, state, ids[:, :cut], dtype="float64")
    second, final = numerics.run(OP, x[:, cut:], kernel, np.asarray(middle), ids[:, cut:], dtype="float64")
    numerics.assert_close((np.concatenate([first, second], axis=1), final), whole, 1e-12)


@given(seed=st.integers(0, 1000), ids=some_ids)
@law
def test_packed_documents_are_documents_alone(seed, ids):
    x, kernel, state = law_inputs(seed)
    y, _ = numerics.run(OP, x, kernel, state, ids, dtype="float64")
    for start, end in numerics.runs(ids[0]):
        alone = np.zeros_like(x)
        alone[:, : end - start] = x[:, start:end]
        alone_state = state if start == 0 else np.zeros_like(state)
        expected, _ = numerics.run(OP, alone, kernel, alone_state, np.zeros_like(ids), dtype="float64")
        numerics.assert_close(y[:, start:end], expected[:, : end - start], 1e-12)


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
