"""causal_attention against an oracle that computes one head of one token at a time, its laws, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlinear.errors import UserError
from jaxlinear.ops import causal_attention, sliding_window_attention
from jaxlinear.ops.attention import op as attention
from tests import naive, numerics, oracles

BACKENDS = ["recurrent", "chunked"]
# name: B, T, H, G, K, V, keys in front, segments
CASES = {
    "one_token": (3, 1, 4, 1, 6, 6, 0, True),
    "one_token_after_keys": (1, 1, 4, 1, 6, 4, 30, True),
    "multi_query": (3, 7, 4, 1, 6, 6, 0, True),
    "multi_head": (1, 64, 3, 3, 4, 5, 0, True),
    "grouped": (2, 64, 4, 2, 5, 3, 0, True),
    "one_head": (3, 7, 1, 1, 4, 2, 0, False),
    "keys_in_front": (2, 40, 2, 2, 4, 4, 29, True),
    "whole": (1, 100, 2, 1, 4, 4, 0, False),
    "long": (1, 257, 2, 1, 4, 4, 0, True),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Gives short inputs many blocks, whose sizes divide neither each other nor the length."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    monkeypatch.setattr(attention, "KEY_RUN", 24)


@functools.cache
def case(name):
    batch, length, heads, groups, key_width, value_width, prefix, packed = CASES[name]
    random = np.random.default_rng(length)
    q = numerics.normal(random, batch, length, heads, key_width)
    k = numerics.normal(random, batch, prefix + length, groups, key_width)
    v = numerics.normal(random, batch, prefix + length, groups, value_width)
    changes = random.random((batch, prefix + length)) < 0.03
    ids = np.cumsum(changes, axis=1, dtype=np.int32) % 2 if packed else None
    everything = {"window": prefix + length, "ids": ids}
    outputs = oracles.sliding_window_attention(q, k, v, **everything)
    cotangents = numerics.normal(random, *outputs.shape)
    reference = numerics.with_gradients(functools.partial(naive.sliding_window_attention, **everything))
    naive_outputs, gradients = numerics.run(reference, (q, k, v), cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return (q, k, v), cotangents, ids, outputs, numerics.wide(gradients)


RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "grouped", "keys_in_front", "long")),
    *(
        (name, dtype, "recurrent")
        for name, dtype in numerics.each_dtype(["one_token", "grouped", "long"], "keys_in_front")
    ),
]


@pytest.mark.parametrize("name, dtype, backend", RUNS)
def test_values_and_gradients(name, dtype, backend):
    inputs, cotangents, ids, outputs, gradients = case(name)
    op = functools.partial(causal_attention, segment_ids=ids, backend=backend)
    found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert found.dtype == dtype


@pytest.mark.parametrize("blocks", [(256, 512), (7, 64), (100, 9), (1, 1)])
def test_blocks_change_nothing(blocks, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(attention, "KEY_RUN", blocks[1])
    inputs, cotangents, ids, outputs, gradients = case("keys_in_front")
    run = numerics.with_gradients(functools.partial(causal_attention, segment_ids=ids))
    found = numerics.run(run, inputs, cotangents, dtype="float64")
    numerics.assert_close(found, (outputs, gradients), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend):
    random = np.random.default_rng(0)
    inputs = tuple(random.standard_normal(shape) for shape in ((1, 20, 4, 3), (1, 27, 2, 3), (1, 27, 2, 5)))
    ids = np.array([[1] * 10 + [2] * 14 + [1] * 3], np.int32)
    weights = random.standard_normal((1, 20, 4, 5))

    def objective(*inputs):
        return np.sum(weights * oracles.sliding_window_attention(*inputs, window=27, scale=0.7, ids=ids))

    op = functools.partial(causal_attention, segment_ids=ids, backend=backend, scale=0.7)
    _, gradients = numerics.run(numerics.with_gradients(op), inputs, weights, dtype="float64")
    for position in range(3):
        directions = [random.standard_normal(y.shape) * (i == position) for i, y in enumerate(inputs)]
        expected = numerics.directional_derivative(objective, inputs, directions)
        found = np.sum(directions[position] * np.asarray(gradients[position]))
        assert found == pytest.approx(expected, rel=1e-6)


# Laws, on B=1, T=40, H=2, G=1, so that each function is compiled once.

LENGTH = 40
some_ids = st.lists(st.integers(0, 9), min_size=LENGTH, max_size=LENGTH).map(
    lambda ids: np.array([ids], np.int32) // 5  # runs of several tokens
)
law = settings(max_examples=15, deadline=None, derandomize=True)


@functools.cache
def op(backend="auto", packed=True):
    def run(q, k, v, ids):
        return causal_attention(q, k, v, segment_ids=ids if packed else None, backend=backend)

    return numerics.jit(run)


@functools.cache
def window():
    run = functools.partial(sliding_window_attention, window=LENGTH)
    return numerics.jit(lambda q, k, v, ids: run(q, k, v, segment_ids=ids))


def law_inputs(seed):
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((1, LENGTH, heads, 3)) for heads in (2, 1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 1000), ids=some_ids, cut=st.sampled_from([17, 39]))
@law
def test_a_run_cut_in_two_is_one_run(backend, seed, ids, cut):
    q, k, v = law_inputs(seed)
    whole = numerics.run(op(backend), q, k, v, ids, dtype="float64")
    first = numerics.run(op(backend), q[:, :cut], k[:, :cut], v[:, :cut], ids[:, :cut], dtype="float64")
    second = numerics.run(op(backend), q[:, cut:], k, v, ids, dtype="float64")
    numerics.assert_close(np.concatenate([first, second], axis=1), whole, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 1000), ids=some_ids)
@law
def test_packed_documents_are_documents_alone(backend, seed, ids):
    inputs = law_inputs(seed)
    packed = numerics.run(op(backend), *inputs, ids, dtype="float64")
    for start, end in numerics.runs(ids[0]):
        alone = [np.zeros_like(y) for y in inputs]
        for y, source in zip(alone, inputs, strict=True):
            y[:, : end - start] = source[:, start:end]
        expected = numerics.run(op(backend, packed=False), *alone, ids, dtype="float64")
        numerics.assert_close(packed[:, start:end], expected[:, : end - start], 1e-12)


@given(seed=st.integers(0, 1000), ids=some_ids)
@law
def test_it_is_a_window_of_the_whole_length(seed, ids):
    inputs = law_inputs(seed)
    expected = numerics.run(window(), *inputs, ids, dtype="float64")
    numerics.assert_close(numerics.run(op(), *inputs, ids, dtype="float64"), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_document_a_token_returns_the_values(backend):
    q, k, v = numerics.cast(law_inputs(2), "float32")
    o = op(backend)(q, k, v, jnp.arange(LENGTH)[None])
    numerics.assert_close(o, jnp.repeat(v, 2, axis=2), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_used_again_names_another_document(backend):
    """Keys are equal, so that the output is the mean of the values seen."""
    q = k = jnp.ones((1, 6, 1, 2))
    v = jnp.arange(1.0, 7.0)[None, :, None, None]
    ids = jnp.array([[1, 1, 2, 2, 1, 1]])
    o = op(backend)(q, k, v, ids)
    numerics.assert_close(o[0, :, 0, 0], np.array([1, 1.5, 3, 3.5, 5, 5.5]), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_hundreds_do_not_overflow(backend):
    """They rise or fall along the keys, so that the largest is in the first block or in the last."""
    q, k, v = law_inputs(3)
    slope = np.linspace(-1, 1, LENGTH)[None, :, None, None]
    inputs = (300 * numerics.representable(q), numerics.representable(k * slope), numerics.representable(v))
    cotangents = np.ones((1, LENGTH, 2, 3))
    reference = numerics.with_gradients(functools.partial(naive.sliding_window_attention, window=LENGTH))
    expected = numerics.run(reference, inputs, cotangents, dtype="float64")
    run = numerics.with_gradients(functools.partial(causal_attention, backend=backend))
    numerics.assert_close(numerics.run(run, inputs, cotangents, dtype="float32"), numerics.wide(expected), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_bfloat16_are_not_rounded_to_it(backend):
    """They are 256 and 257, of which only the first is a bfloat16 number; the log-sum-exps are larger."""
    length = 40
    odd = np.arange(length) % 2
    q, k = np.ones((1, length, 1, 2)), np.stack([np.full(length, 256.0), odd], axis=1)[None, :, None]
    v, cotangents = odd[None, :, None, None] * 1.0, (np.arange(length) == length - 1)[None, :, None, None] * 1.0
    weights = np.exp(odd) / np.sum(np.exp(odd))  # of the last query, the only one with a cotangent
    run = numerics.with_gradients(functools.partial(causal_attention, scale=1.0, backend=backend))
    o, (_, _, dv) = numerics.run(run, (q, k, v), cotangents, dtype="bfloat16")
    numerics.assert_close(o[0, -1, 0, 0], np.sum(weights * odd), 5e-3)
    numerics.assert_close(dv[0, :, 0, 0], weights, 5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_bfloat16_are_float32(backend):
    """Sums with equal weights: of values and, over as many queries, of a value's gradient."""
    length = 1000
    inputs = tuple(np.full((1, length, 1, 1), value) for value in (0.0, 0.0, 1.0))
    run = numerics.with_gradients(functools.partial(causal_attention, backend=backend))
    o, (_, _, dv) = numerics.run(run, inputs, np.ones((1, length, 1, 1)), dtype="bfloat16")
    assert np.all(numerics.wide(o) == 1)
    numerics.assert_close(dv[0, 0, 0, 0], np.sum(1 / np.arange(1, length + 1)), 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtypes", ["float64 bfloat16 float64", "bfloat16 float64 float32", "bfloat16 float32 bfloat16"]
)
def test_dtypes_may_differ(dtypes, backend):
    """Products are in a dtype that holds them all; each gradient is in the dtype of its input."""
    inputs, random = [numerics.representable(x) for x in law_inputs(4)], np.random.default_rng(5)
    cotangents = numerics.normal(random, 1, LENGTH, 2, 3)
    reference = numerics.with_gradients(functools.partial(naive.sliding_window_attention, window=LENGTH))
    expected, expected_gradients = numerics.wide(numerics.run(reference, inputs, cotangents, dtype="float64"))
    dtypes = dtypes.split()
    with jax.enable_x64(True):
        given = tuple(jnp.asarray(x, dtype) for x, dtype in zip(inputs, dtypes, strict=True))
        for run in (causal_attention, functools.partial(sliding_window_attention, window=LENGTH)):
            o, gradients = numerics.with_gradients(functools.partial(run, backend=backend))(given, cotangents)
            assert [x.dtype for x in (*gradients, o)] == [*dtypes, dtypes[2]]
            numerics.assert_close(o, expected, numerics.TOLERANCES[dtypes[2]])
            for found, exact, dtype in zip(gradients, expected_gradients, dtypes, strict=True):
                numerics.assert_close(found, exact, numerics.TOLERANCES["bfloat16" if "bfloat16" in dtypes else dtype])


@pytest.mark.parametrize("length", [2048, 65_536])
def test_memory_grows_with_the_length(length, monkeypatch):
    """Forward and backward, with the default blocks: one T x T matrix of logits would be 17 GB at the greater length."""
    monkeypatch.undo()

    def loss(q, k, v):
        return jnp.sum(causal_attention(q, k, v) ** 2)

    shapes = [jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)] * 3
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
    one = 4 * length * 4 * 64  # bytes of one of the inputs
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * one + 20e6


def test_misfits_are_refused():
    def run(q=(1, 4, 4, 2), k=(1, 4, 2, 2), v=(1, 4, 2, 2), **options):
        causal_attention(*(jnp.ones(shape) for shape in (q, k, v)), **options)

    run()
    with pytest.raises(UserError, match="has no backend 'associative'; it has 'auto', 'recurrent', 'chunked'"):
        run(backend="associative")
    with pytest.raises(UserError, match="causal_attention: 3 key heads do not divide 4 query heads"):
        run(k=(1, 4, 3, 2), v=(1, 4, 3, 2))
    with pytest.raises(UserError, match=r"causal_attention: keys .* do not fit queries"):
        run(k=(1, 3, 2, 2), v=(1, 3, 2, 2))
    with pytest.raises(UserError, match="do not fit queries"):
        run(v=(1, 5, 2, 2))


def test_no_masks_of_all_pairs_are_kept_for_scanned_layers():
    """If layers are scanned and recomputed, masks do not depend on the layer: they would be computed once and kept."""
    length = 4096

    def objective(x, ids):
        def layer(x, _):
            return causal_attention(x, x, x, segment_ids=ids), None

        step = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        return jnp.sum(jax.lax.scan(step, x, None, length=2)[0])

    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(jax.grad(objective)).lower(x, ids).compile()
    # One byte per pair of the lower half would be 8 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4e6
