"""sliding_window_attention against an oracle that computes one head of one token at a time, and its laws."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlinear.errors import UserError
from jaxlinear.ops import sliding_window_attention
from tests import naive, numerics, oracles

BACKENDS = ["recurrent", "chunked"]
# name: B, T, H, G, K, V, window, keys in front, segments
CASES = {
    "one_token": (3, 1, 4, 1, 6, 6, 5, 0, True),
    "one_token_after_keys": (1, 1, 4, 1, 6, 4, 5, 4, True),
    "multi_query": (3, 7, 4, 1, 6, 6, 3, 0, True),
    "multi_head": (1, 64, 3, 3, 4, 5, 10, 0, True),
    "grouped": (1, 64, 4, 2, 5, 3, 64, 0, True),
    "one_head": (3, 7, 1, 1, 4, 2, 100, 0, False),
    "fewer_keys_in_front": (3, 7, 2, 1, 4, 4, 6, 2, True),
    "more_keys_in_front": (1, 100, 2, 2, 4, 4, 6, 9, True),
    "window_1": (1, 7, 2, 1, 4, 4, 1, 0, True),
    "long": (1, 257, 2, 1, 4, 4, 70, 0, True),
    "long_window_of_a_block": (1, 257, 2, 1, 4, 3, 129, 3, False),
}


@functools.cache
def case(name):
    batch, length, heads, groups, key_width, value_width, window, prefix, packed = CASES[name]
    random = np.random.default_rng(length + window)
    q = numerics.normal(random, batch, length, heads, key_width)
    k = numerics.normal(random, batch, prefix + length, groups, key_width)
    v = numerics.normal(random, batch, prefix + length, groups, value_width)
    changes = random.random((batch, prefix + length)) < 0.08
    ids = np.cumsum(changes, axis=1, dtype=np.int32) % 2 if packed else None
    outputs = oracles.sliding_window_attention(q, k, v, window=window, ids=ids)
    cotangents = numerics.normal(random, *outputs.shape)
    reference = numerics.with_gradients(functools.partial(naive.sliding_window_attention, window=window, ids=ids))
    naive_outputs, gradients = numerics.run(reference, (q, k, v), cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return (q, k, v), cotangents, ids, outputs, numerics.wide(gradients)


RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "grouped", "more_keys_in_front", "long")),
    *(
        (name, dtype, "recurrent")
        for name, dtype in numerics.each_dtype(["one_token", "grouped", "long"], "more_keys_in_front")
    ),
]


@pytest.mark.parametrize("name, dtype, backend", RUNS)
def test_values_and_gradients(name, dtype, backend):
    inputs, cotangents, ids, outputs, gradients = case(name)
    op = functools.partial(sliding_window_attention, window=CASES[name][6], segment_ids=ids, backend=backend)
    found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert found.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend):
    random = np.random.default_rng(0)
    inputs = tuple(random.standard_normal(shape) for shape in ((1, 9, 4, 3), (1, 11, 2, 3), (1, 11, 2, 5)))
    ids = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 1, 1]], np.int32)
    weights = random.standard_normal((1, 9, 4, 5))
    statics = {"window": 3, "scale": 0.7}

    def objective(*inputs):
        return np.sum(weights * oracles.sliding_window_attention(*inputs, ids=ids, **statics))

    op = functools.partial(sliding_window_attention, segment_ids=ids, backend=backend, **statics)
    _, gradients = numerics.run(numerics.with_gradients(op), inputs, weights, dtype="float64")
    for position in range(3):
        directions = [random.standard_normal(y.shape) * (i == position) for i, y in enumerate(inputs)]
        expected = numerics.directional_derivative(objective, inputs, directions)
        found = np.sum(directions[position] * np.asarray(gradients[position]))
        assert found == pytest.approx(expected, rel=1e-6)


# Laws, on B=1, T=12, H=2, G=1, so that each function is compiled once.

LENGTH, WINDOW = 12, 4
some_ids = st.lists(st.integers(0, 2), min_size=LENGTH, max_size=LENGTH).map(lambda ids: np.array([ids], np.int32))
law = settings(max_examples=15, deadline=None, derandomize=True)


@functools.cache
def op(window=WINDOW, backend="auto", packed=True):
    def run(q, k, v, ids):
        ids = ids if packed else None
        return sliding_window_attention(q, k, v, window=window, segment_ids=ids, backend=backend)

    return numerics.jit(run)


def law_inputs(seed):
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((1, LENGTH, heads, 3)) for heads in (2, 1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 1000), ids=some_ids, cut=st.sampled_from([3, 5, 11]))
@law
def test_a_run_cut_in_two_is_one_run(backend, seed, ids, cut):
    """The second part needs only the keys and values of the window before the cut."""
    q, k, v = law_inputs(seed)
    whole = numerics.run(op(backend=backend), q, k, v, ids, dtype="float64")
    first = numerics.run(op(backend=backend), q[:, :cut], k[:, :cut], v[:, :cut], ids[:, :cut], dtype="float64")
    start = cut - (WINDOW - 1)
    second = numerics.run(op(backend=backend), q[:, cut:], k[:, start:], v[:, start:], ids[:, start:], dtype="float64")
    numerics.assert_close(np.concatenate([first, second], axis=1), whole, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 1000), ids=some_ids)
@law
def test_packed_documents_are_documents_alone(backend, seed, ids):
    inputs = law_inputs(seed)
    packed = numerics.run(op(backend=backend), *inputs, ids, dtype="float64")
    for start, end in numerics.runs(ids[0]):
        alone = [np.zeros_like(y) for y in inputs]
        for y, source in zip(alone, inputs, strict=True):
            y[:, : end - start] = source[:, start:end]
        expected = numerics.run(op(backend=backend, packed=False), *alone, ids, dtype="float64")
        numerics.assert_close(packed[:, start:end], expected[:, : end - start], 1e-12)


@given(seed=st.integers(0, 1000))
@law
def test_a_window_of_the_whole_length_is_full_causal_attention(seed):
    q, k, v = law_inputs(seed)
    logits = np.einsum("thk,sk->hts", q[0], k[0, :, 0]) / np.sqrt(3)
    weights = np.tril(np.exp(logits))
    full = np.einsum("hts,sv->thv", weights / weights.sum(axis=-1, keepdims=True), v[0, :, 0])[None]
    for window in (LENGTH, LENGTH + 1, 1000):
        found = numerics.run(op(window, packed=False), q, k, v, np.zeros((1, LENGTH), np.int32), dtype="float64")
        numerics.assert_close(found, full, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_one_returns_the_values(backend):
    q, k, v = numerics.cast(law_inputs(1), "float32")
    o = sliding_window_attention(q, k, v, window=1, backend=backend)
    numerics.assert_close(o, jnp.repeat(v, 2, axis=2), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_document_a_token_returns_the_values(backend):
    q, k, v = numerics.cast(law_inputs(2), "float32")
    o = sliding_window_attention(q, k, v, window=5, segment_ids=jnp.arange(LENGTH)[None], backend=backend)
    numerics.assert_close(o, jnp.repeat(v, 2, axis=2), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_used_again_names_another_document(backend):
    """Keys are equal, so that the output is the mean of the values seen."""
    q = k = jnp.ones((1, 6, 1, 2))
    v = jnp.arange(1.0, 7.0)[None, :, None, None]
    ids = jnp.array([[1, 1, 2, 2, 1, 1]])
    o = sliding_window_attention(q, k, v, window=6, segment_ids=ids, backend=backend)
    numerics.assert_close(o[0, :, 0, 0], np.array([1, 1.5, 3, 3.5, 5, 5.5]), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_hundreds_do_not_overflow(backend):
    q, k, v = law_inputs(3)
    inputs = (300 * numerics.representable(q), numerics.representable(k), numerics.representable(v))
    cotangents = np.ones((1, LENGTH, 2, 3))
    reference = numerics.with_gradients(functools.partial(naive.sliding_window_attention, window=WINDOW))
    expected = numerics.run(reference, inputs, cotangents, dtype="float64")
    run = numerics.with_gradients(functools.partial(sliding_window_attention, window=WINDOW, backend=backend))
    numerics.assert_close(numerics.run(run, inputs, cotangents, dtype="float32"), numerics.wide(expected), 1e-3)


def test_misfits_are_refused():
    def run(q=(1, 4, 4, 2), k=(1, 4, 2, 2), v=(1, 4, 2, 2), **options):
        sliding_window_attention(*(jnp.ones(shape) for shape in (q, k, v)), **({"window": 2} | options))

    run()
    with pytest.raises(UserError, match="has no backend 'associative'; it has 'auto', 'recurrent', 'chunked'"):
        run(backend="associative")
    with pytest.raises(UserError, match="3 key heads do not divide 4 query heads"):
        run(k=(1, 4, 3, 2), v=(1, 4, 3, 2))
    with pytest.raises(UserError, match="do not fit queries"):
        run(k=(1, 3, 2, 2), v=(1, 3, 2, 2))
    with pytest.raises(UserError, match="do not fit queries"):
        run(v=(1, 5, 2, 2))
    with pytest.raises(UserError, match="the window is 0; it must be at least 1"):
        run(window=0)
