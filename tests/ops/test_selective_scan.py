"""selective_scan against the step-by-step oracle, its gradients, its laws, its memory, and inputs at the limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlinear.errors import UserError
from jaxlinear.ops import linear_attention, selective_scan
from jaxlinear.ops.selective_scan.family import Inputs
from jaxlinear.ops.selective_scan.op import SelectiveScan
from tests import naive, numerics, oracles

BACKENDS = ["recurrent", "chunked"]
# name: B, T, D, N, whether the transition has its own rates, documents, chunk
CASES = {
    "one_token": (3, 1, 4, 3, True, True, None),
    "short": (2, 7, 3, 5, True, True, 4),
    "short_of_keys": (1, 7, 5, 3, False, False, 3),
    "rates": (1, 257, 6, 4, True, True, 32),
    "of_keys": (1, 257, 6, 4, False, True, None),
    "whole_blocks": (2, 64, 4, 1, True, False, 16),
}
RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "rates", "of_keys")),
    *((name, dtype, "recurrent") for name, dtype in numerics.each_dtype(["one_token", "short_of_keys"], "rates")),
]


def draw(random, batch, length, width, states, with_rates):
    """Decays from almost 1 to 1e-9."""
    x = numerics.normal(random, batch, length, width)
    A = -numerics.uniform(random, width, states, low=0.5, high=states) if with_rates else None
    B, C = (numerics.normal(random, batch, length, states) for _ in range(2))
    dt = numerics.representable(np.exp(random.uniform(-7, 1, x.shape)))
    if A is None:  # a token may forget the whole state, but not more
        dt = numerics.representable(dt / (1 + dt * np.sum(B**2, axis=-1, keepdims=True)))
    return x, dt, A, B, C, numerics.normal(random, batch, width, states)


@functools.cache
def case(name):
    """Inputs, cotangents, documents and, from the oracles, outputs and gradients."""
    *shape, packed, _ = CASES[name]
    random = np.random.default_rng(shape[1] + shape[2])
    inputs = draw(random, *shape)
    ids = np.cumsum(random.random(shape[:2]) < 0.08, axis=1, dtype=np.int32) % 2 if packed else None
    outputs = oracles.selective_scan(*inputs, ids)
    cotangents = numerics.cotangents_like(random, outputs)
    reference = numerics.with_gradients(functools.partial(naive.selective_scan, ids=ids))
    naive_outputs, gradients = numerics.run(reference, inputs, cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return inputs, cotangents, ids, outputs, numerics.wide(gradients)


@pytest.mark.parametrize("name, dtype, backend", RUNS)
def test_values_and_gradients(name, dtype, backend):
    inputs, cotangents, ids, outputs, gradients = case(name)
    chunk = CASES[name][-1] if backend == "chunked" else None
    op = functools.partial(selective_scan, segment_ids=ids, chunk_size=chunk, backend=backend)
    found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert [y.dtype for y in found] == [dtype, "float64" if dtype == "float64" else "float32"]


@pytest.mark.parametrize("with_rates", [True, False])
def test_gradients_are_those_of_finite_differences(with_rates):
    random = np.random.default_rng(0)
    inputs = [y for y in draw(random, 2, 9, 3, 2, with_rates) if y is not None]
    ids = np.array([[0] * 9, [1, 1, 1, 2, 2, 1, 1, 1, 1]], np.int32)
    weights = random.standard_normal(inputs[0].shape), random.standard_normal(inputs[-1].shape)

    def of(function, inputs, **options):
        x, dt, *A, B, C, state = inputs
        return function(x, dt, A[0] if A else None, B, C, state, **options)

    def objective(*inputs):
        return sum(np.sum(w * y) for w, y in zip(weights, of(oracles.selective_scan, inputs, ids=ids), strict=True))

    op = numerics.with_gradients(lambda *inputs: of(selective_scan, inputs, segment_ids=ids, chunk_size=4))
    _, gradients = numerics.run(op, inputs, weights, dtype="float64")
    for position in range(len(inputs)):
        directions = [random.standard_normal(y.shape) * (i == position) for i, y in enumerate(inputs)]
        expected = numerics.directional_derivative(objective, inputs, directions)
        assert np.sum(directions[position] * np.asarray(gradients[position])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_initial_state_is_zeros(backend):
    *inputs, state = case("short")[0]
    run = numerics.jit(functools.partial(selective_scan, backend=backend))
    found = numerics.run(run, *inputs, dtype="float32")
    numerics.assert_close(found, numerics.run(run, *inputs, np.zeros_like(state), dtype="float32"), 0)
    numerics.assert_close(found, oracles.selective_scan(*inputs), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_channel_is_a_head_of_linear_attention_with_values_of_one(backend):
    """B is the key, C the query and dt A the decay by key channel."""
    x, dt, A, B, C, state = case("rates")[0]
    queries, keys = (np.broadcast_to(y[:, :, None], (*x.shape, B.shape[2])) for y in (C, B))
    attend = numerics.jit(functools.partial(linear_attention, scale=1.0, backend="recurrent"))
    inputs = queries, keys, (dt * x)[..., None], dt[..., None] * A, state[..., None]
    o, final = numerics.run(attend, *inputs, dtype="float64")
    found = numerics.run(
        numerics.jit(functools.partial(selective_scan, backend=backend)), x, dt, A, B, C, state, dtype="float64"
    )
    numerics.assert_close(found, (o[..., 0], final[..., 0]), 1e-12)


# Laws, in float64, so that each function is compiled once for each length and chunk.

LENGTH = 12
some_ids = st.lists(st.integers(0, 2), min_size=LENGTH, max_size=LENGTH).map(lambda ids: np.array([ids], np.int32))
seeds = st.integers(0, 1000)
law = settings(max_examples=12, deadline=None, derandomize=True)


@functools.cache
def op(chunk):
    """The operation in blocks, or step by step if ``chunk`` is 0."""

    def run(x, dt, A, B, C, state, ids):
        options = {"chunk_size": chunk} if chunk else {"backend": "recurrent"}
        return selective_scan(x, dt, A, B, C, state, segment_ids=ids, **options)

    return numerics.jit(run)


def law_inputs(seed, with_rates=True):
    return draw(np.random.default_rng(seed), 1, LENGTH, 3, 2, with_rates)


@given(seed=seeds, ids=some_ids)
@law
def test_the_size_of_blocks_changes_nothing(seed, ids):
    expected = numerics.run(op(0), *law_inputs(seed), ids, dtype="float64")
    for chunk in (1, 5, 20):
        numerics.assert_close(numerics.run(op(chunk), *law_inputs(seed), ids, dtype="float64"), expected, 1e-12)


@pytest.mark.parametrize("chunk", [0, 4])
@given(seed=seeds, ids=some_ids)
@law
def test_a_run_cut_in_two_is_one_run(chunk, seed, ids):
    cut = 5
    x, dt, A, B, C, state = law_inputs(seed)
    ids[:, cut] = ids[:, cut - 1]  # the state passed on belongs to the next token's document
    whole = numerics.run(op(chunk), x, dt, A, B, C, state, ids, dtype="float64")

    def piece(part, state):
        of_time = x[:, part], dt[:, part], A, B[:, part], C[:, part]
        return numerics.run(op(chunk), *of_time, np.asarray(state), ids[:, part], dtype="float64")

    first, middle = piece(slice(None, cut), state)
    second, final = piece(slice(cut, None), middle)
    numerics.assert_close((np.concatenate([first, second], axis=1), final), whole, 1e-12)


@given(seed=seeds, ids=some_ids)
@law
def test_packed_documents_are_documents_alone(seed, ids):
    x, dt, A, B, C, state = law_inputs(seed)
    y, final = numerics.run(op(4), x, dt, A, B, C, state, ids, dtype="float64")
    for start, end in numerics.runs(ids[0]):
        # Alone at the front of its row, followed by zeros, which change nothing.
        alone = [np.zeros_like(source) for source in (x, dt, B, C)]
        for place, source in zip(alone, (x, dt, B, C), strict=True):
            place[:, : end - start] = source[:, start:end]
        own_state = state if start == 0 else np.zeros_like(state)
        inputs = *alone[:2], A, *alone[2:], own_state, np.zeros_like(ids)
        expected = numerics.run(op(4), *inputs, dtype="float64")
        numerics.assert_close(y[:, start:end], expected[0][:, : end - start], 1e-12)
    numerics.assert_close(final, expected[1], 1e-12)


@pytest.mark.parametrize("with_rates", [True, False])
@given(seed=seeds, ids=some_ids)
@law
def test_the_family_is_the_operation_however_time_is_split(with_rates, seed, ids):
    """One run, two runs in sequence, and two runs whose maps are composed."""
    inputs = law_inputs(seed, with_rates)
    expected = numerics.run(op(0), *inputs, ids, dtype="float64")
    for way in numerics.run(split_family, *inputs, ids, dtype="float64"):
        numerics.assert_close(way, expected, 1e-12)


@numerics.jit
def split_family(x, dt, A, B, C, state, ids):
    starts = jnp.concatenate([jnp.zeros_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    inputs = Inputs(x, dt, B[:, :, None], C[:, :, None], starts)
    family = SelectiveScan(4)
    whole, *parts = (
        family.prepare(jax.tree.map(lambda x, part=part: x[:, part], inputs), A)
        for part in (slice(None), slice(None, 4), slice(4, None))
    )
    first, second = map(family.summarise, parts)
    middle = family.advance(first, state)
    outputs = jnp.concatenate([family.apply(parts[0], state), family.apply(parts[1], middle)], axis=1)
    return (
        (family.apply(whole, state), family.advance(family.summarise(whole), state)),
        (outputs, family.advance(second, middle)),
        (outputs, family.advance(family.compose(first, second), state)),
    )


def assert_states_are_float32(run):
    """x is 0 in bfloat16: the state, and backward its gradient, only decays. Bfloat16 loses its steps of 2^-12."""
    x, state = jnp.zeros((1, 1001, 4), jnp.bfloat16), jnp.ones((1, 4, 3))
    dt, A, B = jnp.full(x.shape, 2.0**-12), -jnp.ones((4, 3)), jnp.ones((1, 1001, 3))
    both = numerics.with_gradients(lambda state: run(x, dt, A, B, B, state))
    (y, final), (d_state,) = both((state,), (x, state))
    assert y.dtype == jnp.bfloat16
    numerics.assert_close((final, d_state), (np.full(state.shape, np.exp(-1001 * 2.0**-12)),) * 2, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_beside_bfloat16_are_float32(backend):
    assert_states_are_float32(functools.partial(selective_scan, backend=backend))


# Inputs at the limits


def assert_right_in_float32(inputs, ids=None):
    """Values and gradients against those in float64."""
    random = np.random.default_rng(3)
    cotangents = numerics.normal(random, *inputs[0].shape), numerics.normal(random, *inputs[-1].shape)
    reference = numerics.with_gradients(functools.partial(naive.selective_scan, ids=ids))
    expected = numerics.run(reference, inputs, cotangents, dtype="float64")
    run = numerics.with_gradients(functools.partial(selective_scan, segment_ids=ids))
    numerics.assert_close(numerics.run(run, inputs, cotangents, dtype="float32"), expected, 1e-5)


def at_the_limits(time_steps):
    """100 tokens with the time steps ``time_steps(random, shape)``."""
    random = np.random.default_rng(4)
    x, _, A, B, C, state = draw(random, 1, 100, 4, 3, True)
    return x, np.asarray(time_steps(random, x.shape)).astype(np.float32).astype(np.float64), A, B, C, state


def test_long_and_short_time_steps_in_one_block():
    assert_right_in_float32(at_the_limits(lambda random, shape: random.choice([50.0, 1e4, 1e-7, 1e-3, 0.0], shape)))


@pytest.mark.parametrize("value", [0.0, 1e-7, 1e4])
def test_one_time_step_for_all(value):
    assert_right_in_float32(at_the_limits(lambda _, shape: np.full(shape, value)))


def test_one_document_a_token():
    inputs = at_the_limits(lambda random, shape: random.uniform(0, 1, shape))
    assert_right_in_float32(inputs, np.arange(100)[None])


def test_65536_tokens_in_float32():
    random = np.random.default_rng(5)
    x, _, A, B, C, state = draw(random, 1, 65_536, 2, 2, True)
    dt = np.exp(random.uniform(-20, 3, x.shape)).astype(np.float32).astype(np.float64)
    assert_right_in_float32((x, dt, A, B, C, state))


# Memory


@pytest.mark.parametrize("batch, chunk, block", [(1, 64, 64), (64, None, 16)], ids=["given", "by default"])
def test_memory_grows_with_the_inputs_and_a_state_a_block(batch, chunk, block):
    """By default, even if one token's states fill the cache, blocks have at least 16 tokens."""
    width, states = 64, 16

    def temporaries(length):
        shapes = (batch, length, width), (width, states), (batch, length, states)
        x, A, B = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

        def objective(*inputs):
            return jnp.sum(selective_scan(*inputs, chunk_size=chunk)[0] ** 2)

        compiled = numerics.jit(jax.grad(objective, (0, 1, 2, 3, 4))).lower(x, x, A, B, B).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    lengths = 8_192 // batch, 16_384 // batch
    short, long = map(temporaries, lengths)
    # An array like x is a 16th of all tokens' states.
    assert 0 < long - short <= 8_192 * width * states * 4 * (1 / block + 4 / 16)


# What is chosen and what is refused


def test_misfits_are_refused():
    def run(x=(1, 4, 3), dt=(1, 4, 3), A=(3, 2), B=(1, 4, 2), C=(1, 4, 2), state=None, **options):
        arrays = [None if shape is None else jnp.ones(shape) for shape in (x, dt, A, B, C, state)]
        return selective_scan(*arrays, **options)

    run()
    run(A=None)
    with pytest.raises(UserError, match="has no backend 'associative'; it has 'auto', 'recurrent', 'chunked'"):
        run(backend="associative")
    with pytest.raises(UserError, match=r"x is \(4, 3\); it must be \[B, T, D\]"):
        run(x=(4, 3))
    with pytest.raises(UserError, match=r"dt \(1, 4, 1\) does not have the shape of x \(1, 4, 3\)"):
        run(dt=(1, 4, 1))
    with pytest.raises(UserError, match=r"B \(1, 5, 2\) does not fit x \(1, 4, 3\); it must be \[B, T, N\]"):
        run(B=(1, 5, 2))
    with pytest.raises(UserError, match=r"C \(1, 4, 3\) does not have the shape of B \(1, 4, 2\)"):
        run(C=(1, 4, 3))
    with pytest.raises(UserError, match=r"A is \(2, 3\), not \[D, N\] = \(3, 2\)"):
        run(A=(2, 3))
    with pytest.raises(UserError, match=r"the initial state is \(1, 2, 3\), not \[B, D, N\] = \(1, 3, 2\)"):
        run(state=(1, 2, 3))
    with pytest.raises(UserError, match="chunk_size=4 is for backend='chunked'"):
        run(chunk_size=4, backend="recurrent")
    with pytest.raises(UserError, match="chunk_size=0 must be a whole number of tokens, at least 1"):
        run(chunk_size=0)
    with pytest.raises(UserError, match="A has dtype complex64; it must be real"):
        selective_scan(
            *(jnp.ones((1, 4, 3)) for _ in range(2)),
            jnp.ones((3, 2), complex),
            *(jnp.ones((1, 4, 2)) for _ in range(2)),
        )


def test_empty_arrays():
    for shape in ((0, 4, 3), (1, 0, 3), (1, 4, 0)):
        batch, length, width = shape
        x, B = jnp.ones(shape), jnp.ones((batch, length, 2))
        y, final = selective_scan(x, x, -jnp.ones((width, 2)), B, B)
        assert y.shape == shape and final.shape == (batch, width, 2) and not final.any()
