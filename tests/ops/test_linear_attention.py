"""linear_attention against the step-by-step oracle, its gradients, its laws, its memory, and inputs at the limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlinear.errors import UserError
from jaxlinear.ops import linear_attention, protocol
from jaxlinear.ops.linear_attention.op import Inputs, LinearAttention, choose
from tests import naive, numerics, oracles

BACKENDS = ["recurrent", "chunked"]
# name: B, T, H, K, V, decay, segments, chunk
CASES = {
    "one_token": (3, 1, 2, 4, 3, "channel", True, None),
    "short": (2, 7, 1, 3, 5, "scalar", True, 4),
    "short_channel": (1, 7, 2, 5, 3, "channel", False, 3),
    "none": (1, 64, 2, 4, 6, "none", True, 16),
    "constant": (2, 100, 3, 4, 4, "constant", False, 32),
    "constant_packed": (1, 100, 2, 4, 6, "constant", True, None),
    "scalar": (1, 257, 1, 8, 4, "scalar", True, None),
    "channel": (1, 257, 2, 8, 4, "channel", True, 32),
    "channel_whole_chunks": (2, 64, 1, 4, 6, "channel", True, None),
    "no_documents": (1, 100, 4, 4, 3, "scalar", False, 100),
}
RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "none", "constant", "scalar", "channel")),
    *((name, dtype, "recurrent") for name, dtype in numerics.each_dtype(["one_token", "none", "constant"], "channel")),
]


def draw_decay(random, kind, batch, length, heads, width):
    """Decays from almost 1 to 1e-9: no entry of ``log_decay`` is rounded to zero in bfloat16."""
    shapes = {"constant": (heads,), "scalar": (batch, length, heads), "channel": (batch, length, heads, width)}
    return None if kind == "none" else numerics.representable(-np.exp(random.uniform(-7, 3, shapes[kind])))


@functools.cache
def case(name):
    """Inputs, cotangents and, from the oracles, outputs and gradients."""
    batch, length, heads, width, value_width, kind, packed, _ = CASES[name]
    random = np.random.default_rng(length + width)
    q, k = (numerics.normal(random, batch, length, heads, width) for _ in range(2))
    v = numerics.normal(random, batch, length, heads, value_width)
    state = numerics.normal(random, batch, heads, width, value_width)
    inputs = (q, k, v, draw_decay(random, kind, batch, length, heads, width), state)
    ids = np.cumsum(random.random((batch, length)) < 0.08, axis=1, dtype=np.int32) % 2 if packed else None
    outputs = oracles.linear_attention(*inputs, ids)
    cotangents = numerics.cotangents_like(random, outputs)
    reference = numerics.with_gradients(functools.partial(naive.linear_attention, ids=ids))
    naive_outputs, gradients = numerics.run(reference, inputs, cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return inputs, cotangents, ids, outputs, numerics.wide(gradients)


@pytest.mark.parametrize("name, dtype, backend", RUNS)
def test_values_and_gradients(name, dtype, backend):
    inputs, cotangents, ids, outputs, gradients = case(name)
    chunk = CASES[name][-1] if backend == "chunked" else None
    op = functools.partial(linear_attention, segment_ids=ids, chunk_size=chunk, backend=backend)
    found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert [y.dtype for y in found] == [dtype, "float64" if dtype == "float64" else "float32"]


@pytest.mark.parametrize("backend, kind", [("recurrent", "channel"), ("chunked", "constant"), ("chunked", "channel")])
def test_gradients_are_those_of_finite_differences(backend, kind):
    random = np.random.default_rng(0)
    q, k, v, state = (
        random.standard_normal(shape) for shape in ((2, 9, 2, 3), (2, 9, 2, 3), (2, 9, 2, 4), (2, 2, 3, 4))
    )
    log_decay = -random.uniform(0.1, 1, (2,) if kind == "constant" else q.shape)
    ids = np.array([[0] * 9, [1, 1, 1, 2, 2, 1, 1, 1, 1]], np.int32)
    inputs, weights = (
        (q, k, v, log_decay, state),
        (random.standard_normal(v.shape), random.standard_normal(state.shape)),
    )

    def objective(*inputs):
        outputs = oracles.linear_attention(*inputs, ids, scale=0.7)
        return sum(np.sum(w * y) for w, y in zip(weights, outputs, strict=True))

    chunk = 4 if backend == "chunked" else None
    op = functools.partial(linear_attention, segment_ids=ids, scale=0.7, chunk_size=chunk, backend=backend)
    _, gradients = numerics.run(numerics.with_gradients(op), inputs, weights, dtype="float64")
    for position in range(5):
        directions = [random.standard_normal(y.shape) * (i == position) for i, y in enumerate(inputs)]
        expected = numerics.directional_derivative(objective, inputs, directions)
        assert np.sum(directions[position] * np.asarray(gradients[position])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_initial_state_is_zeros(backend):
    *inputs, state = case("short")[0]
    run = numerics.jit(functools.partial(linear_attention, backend=backend))
    found = numerics.run(run, *inputs, dtype="float32")
    numerics.assert_close(found, numerics.run(run, *inputs, np.zeros_like(state), dtype="float32"), 0)
    numerics.assert_close(found, oracles.linear_attention(*inputs), 1e-6)


# Laws, on [1, 12, 2, 3] and [1, 12, 2, 2] in float64, so that each function is compiled once for each length and chunk.

LENGTH = 12
some_ids = st.lists(st.integers(0, 2), min_size=LENGTH, max_size=LENGTH).map(lambda ids: np.array([ids], np.int32))
seeds = st.integers(0, 1000)
law = settings(max_examples=12, deadline=None, derandomize=True)


@functools.cache
def op(chunk):
    """The operation in chunks, or step by step if ``chunk`` is 0."""

    def run(q, k, v, log_decay, state, ids):
        options = {"chunk_size": chunk} if chunk else {"backend": "recurrent"}
        return linear_attention(q, k, v, log_decay, state, segment_ids=ids, **options)

    return numerics.jit(run)


def law_inputs(seed):
    """Decays by channel, some of them zero."""
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((1, LENGTH, 2, width)) for width in (3, 3, 2))
    log_decay = -np.exp(random.uniform(-10, 2, q.shape))
    log_decay[random.random(q.shape) < 0.05] = -np.inf
    return q, k, v, log_decay, random.standard_normal((1, 2, 3, 2))


@given(seed=seeds, ids=some_ids)
@law
def test_the_size_of_chunks_changes_nothing(seed, ids):
    expected = numerics.run(op(0), *law_inputs(seed), ids, dtype="float64")
    for chunk in (1, 5, 20):
        numerics.assert_close(numerics.run(op(chunk), *law_inputs(seed), ids, dtype="float64"), expected, 1e-12)


@pytest.mark.parametrize("chunk", [0, 4])
@given(seed=seeds, ids=some_ids)
@law
def test_a_run_cut_in_two_is_one_run(chunk, seed, ids):
    cut = 5
    *inputs, state = law_inputs(seed)
    ids[:, cut] = ids[:, cut - 1]  # the state passed on belongs to the next token's document
    whole = numerics.run(op(chunk), *inputs, state, ids, dtype="float64")
    first, middle = numerics.run(op(chunk), *(y[:, :cut] for y in inputs), state, ids[:, :cut], dtype="float64")
    rest = (*(y[:, cut:] for y in inputs), np.asarray(middle), ids[:, cut:])
    second, final = numerics.run(op(chunk), *rest, dtype="float64")
    numerics.assert_close((np.concatenate([first, second], axis=1), final), whole, 1e-12)


@pytest.mark.parametrize("chunk", [0, 4])
@given(seed=seeds, ids=some_ids)
@law
def test_packed_documents_are_documents_alone(chunk, seed, ids):
    *inputs, state = law_inputs(seed)
    o, final = numerics.run(op(chunk), *inputs, state, ids, dtype="float64")
    for start, end in numerics.runs(ids[0]):
        # Alone at the front of its row, followed by zeros, which change nothing.
        alone = [np.zeros_like(y) for y in inputs]
        for y, source in zip(alone, inputs, strict=True):
            y[:, : end - start] = source[:, start:end]
        alone_state = state if start == 0 else np.zeros_like(state)
        expected = numerics.run(op(chunk), *alone, alone_state, np.zeros_like(ids), dtype="float64")
        numerics.assert_close(o[:, start:end], expected[0][:, : end - start], 1e-12)
    numerics.assert_close(final, expected[1], 1e-12)


@pytest.mark.parametrize("constant", [False, True], ids=["channel", "constant"])
@given(seed=seeds, ids=some_ids)
@law
def test_the_family_is_the_operation_however_time_is_split(constant, seed, ids):
    """One run, two runs in sequence, and two runs whose maps are composed."""
    q, k, v, log_decay, state = law_inputs(seed)
    log_decay, constants = (None, log_decay[0, 0, :, 0]) if constant else (log_decay, None)
    expected = numerics.run(op(0), q, k, v, constants if constant else log_decay, state, ids, dtype="float64")
    found = numerics.run(split_family, (q, k, v, log_decay, ids), constants, state, dtype="float64")
    for way in found:
        numerics.assert_close(way, expected, 1e-12)


@numerics.jit
def split_family(arrays, constants, state):
    q, k, v, log_decay, ids = arrays
    starts = jnp.concatenate([jnp.zeros_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    inputs = Inputs(q, k, v, log_decay, starts, None if constants is None else jnp.ones_like(starts))
    family = LinearAttention(3**-0.5)
    whole, *parts = (
        family.prepare(jax.tree.map(lambda x, part=part: x[:, part], inputs), constants)
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


@pytest.mark.parametrize("shape", [(100, 2), (100, 2, 3), (2,)], ids=["scalar", "channel", "constant"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_forgets_and_one_sums(backend, shape):
    """Whole numbers, so that float32 is exact."""
    random = np.random.default_rng(2)
    q, k, v, state = (
        jnp.asarray(random.integers(-4, 5, shape), jnp.float32)
        for shape in ((1, 100, 2, 3), (1, 100, 2, 3), (1, 100, 2, 4), (1, 2, 3, 4))
    )
    shape = shape if len(shape) == 1 else (1, *shape)

    @numerics.jit
    def run(log_decay):
        return linear_attention(q, k, v, log_decay, state, scale=1.0, backend=backend)

    writes = np.einsum("bthk,bthv->bthkv", k, v)
    for nothing in (-jnp.inf, -1e4):
        o, final = run(jnp.full(shape, nothing))
        assert np.array_equal(o, np.einsum("bthk,bthkv->bthv", q, writes)) and np.array_equal(final, writes[:, -1])
    sums = np.cumsum(writes, axis=1) + np.asarray(state)[:, None]
    for all_of_it in (jnp.zeros(shape), None):
        o, final = run(all_of_it)
        assert np.array_equal(o, np.einsum("bthk,bthkv->bthv", q, sums)) and np.array_equal(final, sums[:, -1])


# Inputs at the limits


@functools.cache
def reference(packed):
    ids = np.arange(100)[None] if packed else None
    return numerics.with_gradients(functools.partial(naive.linear_attention, ids=ids))


@functools.cache
def in_float32(backend, packed):
    ids = np.arange(100)[None] if packed else None
    return numerics.with_gradients(functools.partial(linear_attention, segment_ids=ids, backend=backend))


def assert_right_in_float32(backend, inputs, packed=False):
    """Values and gradients against those in float64; ``packed`` makes every token a document."""
    random = np.random.default_rng(3)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[4].shape)
    expected = numerics.run(reference(packed), inputs, cotangents, dtype="float64")
    found = numerics.run(in_float32(backend, packed), inputs, cotangents, dtype="float32")
    numerics.assert_close(found, expected, 1e-5)


def at_the_limits(kind, log_decay):
    """100 tokens with the log decays ``log_decay(random, shape)``."""
    random = np.random.default_rng(4)
    q, k, v, state = (numerics.normal(random, *shape) for shape in (*[(1, 100, 2, 4)] * 3, (1, 2, 4, 4)))
    shapes = {"constant": (2,), "scalar": (1, 100, 2), "channel": q.shape}
    return q, k, v, np.asarray(log_decay(random, shapes[kind])).astype(np.float32).astype(np.float64), state


@pytest.mark.parametrize("kind", ["constant", "scalar", "channel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_and_weak_decays_in_one_chunk(backend, kind):
    mixed = at_the_limits(kind, lambda random, shape: random.choice([-50.0, -1e4, -1e-7, -1e-3, 0.0], shape))
    assert_right_in_float32(backend, mixed)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_nothing_is_lost_behind_strong_decays(kind):
    """Log decays are -50 per step in most of a chunk and small at its end: a difference of two sums would lose these."""
    inputs = at_the_limits(kind, lambda _, shape: np.full(shape, -50.0))
    inputs[3][:, 50:] = -0.01
    assert_right_in_float32("chunked", inputs)


@pytest.mark.parametrize("kind", ["constant", "scalar", "channel"])
@pytest.mark.parametrize("value", [-1e-7, -50.0, -np.inf])
def test_one_decay_for_all(kind, value):
    assert_right_in_float32("chunked", at_the_limits(kind, lambda _, shape: np.full(shape, value)))


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_equal_keys_and_zeros(kind):
    q, k, v, log_decay, state = at_the_limits(kind, lambda random, shape: -random.uniform(0, 1, shape))
    assert_right_in_float32("chunked", (q, k[:, :1] + np.zeros_like(k), v, log_decay, state))
    assert_right_in_float32("chunked", tuple(np.zeros_like(y) for y in (q, k, v, log_decay, state)))


@pytest.mark.parametrize("backend, kind", [("recurrent", "channel"), ("chunked", "scalar"), ("chunked", "channel")])
def test_one_document_a_token(backend, kind):
    inputs = at_the_limits(kind, lambda random, shape: -random.uniform(0, 1, shape))
    assert_right_in_float32(backend, inputs, packed=True)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_65536_tokens_in_float32(kind):
    random = np.random.default_rng(5)
    q, k, v = (numerics.normal(random, 1, 65_536, 1, 2) for _ in range(3))
    state = numerics.normal(random, 1, 1, 2, 2)
    log_decay = -np.exp(random.uniform(-20, 3, q.shape if kind == "channel" else q.shape[:3])).astype(np.float32)
    assert_right_in_float32("chunked", (q, k, v, log_decay.astype(np.float64), state))


def test_no_decay_adds_up_65536_tokens():
    """Whole numbers, so that float32 is exact."""
    random = np.random.default_rng(6)
    q, k, v = (random.integers(-1, 2, (1, 65_536, 1, 2)).astype(np.float64) for _ in range(3))
    o, final = numerics.run(numerics.jit(functools.partial(linear_attention, scale=1.0)), q, k, v, dtype="float32")
    sums = np.cumsum(np.einsum("bthk,bthv->bthkv", k, v), axis=1)
    assert np.array_equal(o, np.einsum("bthk,bthkv->bthv", q, sums)) and np.array_equal(final, sums[:, -1])


def assert_states_are_float32(run, kind):
    """The state, and backward its gradient, sums 1,001 equal terms: a bfloat16 sum stops growing at 256."""
    x, state = jnp.ones((1, 1001, 1, 16), jnp.bfloat16), jnp.zeros((1, 1, 16, 16))
    shapes = {"constant": (1,), "scalar": x.shape[:3], "channel": x.shape}
    log_decay = None if kind == "none" else jnp.zeros(shapes[kind])
    both = numerics.with_gradients(lambda state: run(x, x, x, log_decay, state))
    (o, final), (d_state,) = both((state,), (jnp.ones_like(x), jnp.zeros_like(state)))
    assert o.dtype == jnp.bfloat16 and np.all(final == 1001) and np.all(d_state == 1001 / 4)  # K^-1/2


@pytest.mark.parametrize("kind", ["none", "constant", "scalar", "channel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_bfloat16_are_float32(backend, kind):
    assert_states_are_float32(functools.partial(linear_attention, backend=backend), kind)


# Memory


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_memory_grows_with_the_inputs_and_a_state_a_chunk(kind):
    heads, width = 2, 32

    def temporaries(length):
        array = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)
        log_decay = None if kind == "none" else array

        def objective(q, k, v, log_decay):
            return jnp.sum(linear_attention(q, k, v, log_decay)[0] ** 2)

        arguments = (0, 1, 2) if log_decay is None else (0, 1, 2, 3)
        compiled = numerics.jit(jax.grad(objective, arguments)).lower(array, array, array, log_decay).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(8_192), temporaries(16_384)
    # Of all tokens' states, those before each chunk are a 64th or a 32nd, and an array like the inputs is a 32nd.
    assert 0 < long - short <= 8_192 * heads * width * width * 4 / 16
    # For any T: one group of chunks, and what follows from it.
    assert short - (long - short) < 10 * protocol._CPU_GROUP_BYTES


# What is chosen and what is refused


def test_auto_takes_chunks_for_more_than_a_few_tokens():
    def chunk(backend, length, chunk_size=None):
        q = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
        return choose(q, q, q, backend=backend, chunk_size=chunk_size).chunk

    assert [chunk("auto", length) for length in (1, 8, 9, 33, 10_000)] == [None, None, 16, 64, 64]
    assert [chunk("chunked", length) for length in (1, 8, 100)] == [1, 8, 64]
    assert chunk("recurrent", 10_000) is None
    assert chunk("auto", 1, chunk_size=5) == 5


def test_misfits_are_refused():
    def run(q=(1, 4, 2, 3), k=(1, 4, 2, 3), v=(1, 4, 2, 5), log_decay=None, state=None, **options):
        optional = [None if shape is None else jnp.zeros(shape) for shape in (log_decay, state)]
        linear_attention(*(jnp.ones(shape) for shape in (q, k, v)), *optional, **options)

    run()
    with pytest.raises(UserError, match="has no backend 'associative'; it has 'auto', 'recurrent', 'chunked'"):
        run(backend="associative")
    with pytest.raises(UserError, match="do not have the shape of the queries"):
        run(k=(1, 4, 2, 5))
    with pytest.raises(UserError, match="do not fit queries"):
        run(v=(1, 4, 1, 5))
    with pytest.raises(UserError, match=r"log_decay \(4,\) does not fit .* it must be \[H\] or \[B, T, H\] or"):
        run(log_decay=(4,))
    with pytest.raises(UserError, match="the initial state is"):
        run(state=(1, 2, 5, 3))
    with pytest.raises(UserError, match="chunk_size=4 is for backend='chunked'"):
        run(chunk_size=4, backend="recurrent")
    for chunk_size in (0, -1, 2.5):
        with pytest.raises(UserError, match=f"chunk_size={chunk_size} must be a whole number of tokens, at least 1"):
            run(chunk_size=chunk_size)
