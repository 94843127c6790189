"""delta_rule against the step-by-step oracle, its gradients, its laws, its memory, and inputs at the limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, delta_rule
from jaxlinear.ops.delta_rule.op import DeltaRule, Inputs, choose
from tests import naive, numerics, oracles

BACKENDS = ["recurrent", "chunked"]
# name: B, T, H, K, V, decay, segments, chunk
CASES = {
    "one_token": (3, 1, 2, 4, 3, "channel", True, None),
    "short": (2, 7, 1, 3, 5, "scalar", True, 4),
    "short_channel": (1, 7, 2, 5, 3, "channel", False, 3),
    "none": (1, 64, 2, 4, 6, "none", True, 16),
    "none_long": (2, 100, 3, 4, 4, "none", False, None),
    "scalar": (1, 257, 1, 8, 4, "scalar", True, None),
    "scalar_whole": (1, 100, 2, 4, 4, "scalar", False, 100),
    "channel": (1, 257, 2, 8, 4, "channel", True, None),
}
RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "none", "scalar", "channel")),
    *((name, dtype, "recurrent") for name, dtype in numerics.each_dtype(["one_token", "none", "scalar"], "channel")),
]


def unit(x):
    return numerics.representable(x / np.linalg.norm(x, axis=-1, keepdims=True))


def draw_decay(random, kind, batch, length, heads, width):
    """Decays from almost 1 to 1e-9: no entry of ``log_decay`` is rounded to zero in bfloat16."""
    shapes = {"scalar": (batch, length, heads), "channel": (batch, length, heads, width)}
    return None if kind == "none" else numerics.representable(-np.exp(random.uniform(-7, 3, shapes[kind])))


@functools.cache
def case(name):
    """Inputs, cotangents and, from the oracles, outputs and gradients."""
    batch, length, heads, width, value_width, kind, packed, _ = CASES[name]
    random = np.random.default_rng(length + width)
    q, k = (numerics.normal(random, batch, length, heads, width) for _ in range(2))
    v = numerics.normal(random, batch, length, heads, value_width)
    beta = numerics.uniform(random, batch, length, heads, low=-0.1, high=1.9)
    state = numerics.normal(random, batch, heads, width, value_width)
    inputs = (q, unit(k), v, beta, draw_decay(random, kind, batch, length, heads, width), state)
    ids = np.cumsum(random.random((batch, length)) < 0.08, axis=1, dtype=np.int32) % 2 if packed else None
    outputs = oracles.delta_rule(*inputs, ids)
    cotangents = numerics.cotangents_like(random, outputs)
    reference = numerics.with_gradients(functools.partial(naive.delta_rule, ids=ids))
    naive_outputs, gradients = numerics.run(reference, inputs, cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return inputs, cotangents, ids, outputs, numerics.wide(gradients)


@pytest.mark.parametrize("name, dtype, backend", RUNS)
def test_values_and_gradients(name, dtype, backend):
    inputs, cotangents, ids, outputs, gradients = case(name)
    chunk = CASES[name][-1] if backend == "chunked" else None
    op = functools.partial(delta_rule, segment_ids=ids, chunk_size=chunk, backend=backend)
    found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert [y.dtype for y in found] == [dtype, "float64" if dtype == "float64" else "float32"]


@pytest.mark.parametrize("backend, kind", [("recurrent", "channel"), ("chunked", "none"), ("chunked", "channel")])
def test_gradients_are_those_of_finite_differences(backend, kind):
    random = np.random.default_rng(0)
    q, k, v, beta, state = (
        random.standard_normal(shape) for shape in (*[(2, 9, 2, 3)] * 2, (2, 9, 2, 4), (2, 9, 2), (2, 2, 3, 4))
    )
    log_decay = -random.uniform(0.1, 1, q.shape)
    ids = np.array([[0] * 9, [1, 1, 1, 2, 2, 1, 1, 1, 1]], np.int32)
    inputs, weights = [q, k / 2, v, beta, log_decay, state], tuple(map(random.standard_normal, (v.shape, state.shape)))
    if kind == "none":
        del inputs[4]

    def named(inputs):
        names = ("q", "k", "v", "beta", *(() if kind == "none" else ("log_decay",)), "initial_state")
        return dict(zip(names, inputs, strict=True))

    def objective(*inputs):
        outputs = oracles.delta_rule(**named(inputs), ids=ids, scale=0.7)
        return sum(np.sum(w * y) for w, y in zip(weights, outputs, strict=True))

    chunk = 4 if backend == "chunked" else None
    options = {"segment_ids": ids, "scale": 0.7, "chunk_size": chunk, "backend": backend}
    run = numerics.with_gradients(lambda *inputs: delta_rule(**named(inputs), **options))
    _, gradients = numerics.run(run, inputs, weights, dtype="float64")
    for position in range(len(inputs)):
        directions = [random.standard_normal(y.shape) * (i == position) for i, y in enumerate(inputs)]
        expected = numerics.directional_derivative(objective, inputs, directions)
        assert np.sum(directions[position] * np.asarray(gradients[position])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_initial_state_is_zeros(backend):
    q, k, v, beta, log_decay, _ = case("short")[0]
    inputs = numerics.cast((q, k, v, beta, log_decay), "float32")
    run = numerics.jit(functools.partial(delta_rule, backend=backend))
    found = run(*inputs)
    numerics.assert_close(found, run(*inputs, jnp.zeros((2, 1, 3, 5))), 0)
    numerics.assert_close(found, oracles.delta_rule(q, k, v, beta, log_decay), 1e-6)


# Laws, on [1, 12, 2, 3] and [1, 12, 2, 2] in float64, so that each function is compiled once for each length and chunk.

LENGTH = 12
some_ids = st.lists(st.integers(0, 2), min_size=LENGTH, max_size=LENGTH).map(lambda ids: np.array([ids], np.int32))
seeds = st.integers(0, 1000)
law = settings(max_examples=12, deadline=None, derandomize=True)


@functools.cache
def op(chunk):
    """The operation in chunks, or step by step if ``chunk`` is 0."""

    def run(q, k, v, beta, log_decay, state, ids):
        options = {"chunk_size": chunk} if chunk else {"backend": "recurrent"}
        return delta_rule(q, k, v, beta, log_decay, state, segment_ids=ids, scale=1.0, **options)

    return numerics.jit(run)


def law_inputs(seed):
    """Decays by channel, some of them zero, and beta in 0 .. 2, sometimes at either end."""
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((1, LENGTH, 2, width)) for width in (3, 3, 2))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta = np.clip(random.uniform(-0.2, 2.2, (1, LENGTH, 2)), 0, 2)
    log_decay = -np.exp(random.uniform(-10, 2, q.shape))
    log_decay[random.random(q.shape) < 0.05] = -np.inf
    return q, k, v, beta, log_decay, random.standard_normal((1, 2, 3, 2))


def no_ids():
    return np.zeros((1, LENGTH), np.int32)


@given(seed=seeds, ids=some_ids)
@law
def test_the_size_of_chunks_changes_nothing(seed, ids):
    expected = numerics.run(op(0), *law_inputs(seed), ids, dtype="float64")
    for chunk in (1, 5, 20):
        numerics.assert_close(numerics.run(op(chunk), *law_inputs(seed), ids, dtype="float64"), expected, 1e-12)


@pytest.mark.parametrize("chunk", [0, 5])
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


@pytest.mark.parametrize("chunk", [0, 5])
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
        expected = numerics.run(op(chunk), *alone, alone_state, no_ids(), dtype="float64")
        numerics.assert_close(o[:, start:end], expected[0][:, : end - start], 1e-12)
    numerics.assert_close(final, expected[1], 1e-12)


@pytest.mark.parametrize("chunk", [0, 5])
@given(seed=seeds)
@law
def test_beta_zero_leaves_the_state(chunk, seed):
    q, k, v, beta, log_decay, state = law_inputs(seed)
    log_decay = np.maximum(log_decay, -1.0)
    o, final = numerics.run(op(chunk), q, k, v, 0 * beta, 0 * log_decay, state, no_ids(), dtype="float64")
    assert np.array_equal(final, state)
    numerics.assert_close(o, np.einsum("bthk,bhkv->bthv", q, state), 1e-14)
    _, final = numerics.run(op(chunk), q, k, v, 0 * beta, log_decay, state, no_ids(), dtype="float64")
    numerics.assert_close(final, np.exp(log_decay.sum(axis=1))[..., None] * state, 1e-13)


@pytest.mark.parametrize("chunk", [0, 5])
@given(seed=seeds)
@law
def test_what_was_last_written_at_a_unit_key_is_read(chunk, seed):
    _, k, v, beta, _, state = law_inputs(seed)
    run = functools.partial(numerics.run, op(chunk), dtype="float64")
    o, final = run(k, k, v, np.ones_like(beta), np.zeros_like(k), state, no_ids())
    numerics.assert_close(o, v, 1e-12)
    numerics.assert_close(np.einsum("bhk,bhkv->bhv", k[:, -1], final), v[:, -1], 1e-12)


@pytest.mark.parametrize("chunk", [0, 5])
@given(seed=seeds)
@law
def test_a_decay_to_zero_forgets(chunk, seed):
    q, k, v, beta, log_decay, state = law_inputs(seed)
    writes = np.einsum("bth,bthk,bthv->bthkv", beta, k, v)
    expected = np.einsum("bthk,bthkv->bthv", q, writes), writes[:, -1]
    for nothing in (-np.inf, -1e4):
        decays = np.full_like(log_decay, nothing)
        found = numerics.run(op(chunk), q, k, v, beta, decays, state, no_ids(), dtype="float64")
        numerics.assert_close(found, expected, 1e-14)


@given(seed=seeds, ids=some_ids)
@law
def test_the_family_is_the_operation_however_time_is_split(seed, ids):
    """One run, two runs in sequence, two runs whose maps are composed, and the state directly from the runs."""
    *inputs, state = law_inputs(seed)
    expected = numerics.run(op(0), *inputs, state, ids, dtype="float64")
    for way in numerics.run(split_family, (*inputs, ids), state, dtype="float64"):
        numerics.assert_close(way, expected, 1e-12)


@numerics.jit
def split_family(arrays, state):
    *arrays, ids = arrays
    starts = jnp.concatenate([jnp.zeros_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    inputs = Inputs(*arrays, starts)
    family = DeltaRule(1.0)
    whole, *parts = (
        family.prepare(jax.tree.map(lambda x, part=part: x[:, part], inputs), None)
        for part in (slice(None), slice(None, 4), slice(4, None))
    )
    first, second = map(family.summarise, parts)
    middle = family.advance(first, state)
    outputs = jnp.concatenate([family.apply(parts[0], state), family.apply(parts[1], middle)], axis=1)
    return (
        (family.apply(whole, state), family.advance(family.summarise(whole), state)),
        (outputs, family.advance(second, middle)),
        (outputs, family.advance(family.compose(first, second), state)),
        family.through(whole, state),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_is_exact(backend):
    """Keys select the rows of a table and beta is 1: each token writes one row and reads one. Whole numbers in float32."""
    random = np.random.default_rng(2)
    written, read = random.integers(0, 4, (2, 257))
    v, table = random.integers(-9, 10, (257, 3)), random.integers(-9, 10, (4, 3))
    keys, queries = (np.eye(4)[None, rows, None] for rows in (written, read))
    inputs = queries, keys, v[None, :, None], np.ones((1, 257, 1)), table[None, None]
    run = numerics.jit(lambda q, k, v, beta, s: delta_rule(q, k, v, beta, None, s, scale=1.0, backend=backend))
    o, final = numerics.run(run, *(x.astype(np.float64) for x in inputs), dtype="float32")
    for t in range(257):
        table[written[t]] = v[t]
        assert np.array_equal(o[0, t, 0], table[read[t]])
    assert np.array_equal(final[0, 0], table)


def assert_states_are_float32(run, kind):
    """Keys of 0 replace nothing: the state, and backward its gradient, only decays. Bfloat16 loses its steps of 2^-12."""
    nothing, state = jnp.zeros((1, 1001, 1, 16), jnp.bfloat16), jnp.ones((1, 1, 16, 16))
    beta = jnp.ones(nothing.shape[:3])
    log_decay = jnp.full(nothing.shape if kind == "channel" else beta.shape, -(2.0**-12))
    both = numerics.with_gradients(lambda state: run(nothing, nothing, nothing + 1, beta, log_decay, state))
    (o, final), (d_state,) = both((state,), (nothing, state))
    assert o.dtype == jnp.bfloat16
    numerics.assert_close((final, d_state), (np.full(state.shape, np.exp(-1001 * 2.0**-12)),) * 2, 1e-4)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_bfloat16_are_float32(backend, kind):
    assert_states_are_float32(functools.partial(delta_rule, backend=backend), kind)


# Inputs at the limits


@functools.cache
def reference(packed):
    ids = np.arange(100)[None] if packed else None
    return numerics.with_gradients(functools.partial(naive.delta_rule, ids=ids))


@functools.cache
def in_float32(backend, packed):
    ids = np.arange(100)[None] if packed else None
    return numerics.with_gradients(functools.partial(delta_rule, segment_ids=ids, backend=backend))


def assert_right_in_float32(backend, inputs, packed=False, tolerance=1e-5):
    """Values and gradients against those in float64; ``packed`` makes every token a document."""
    random = np.random.default_rng(3)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[5].shape)
    expected = numerics.run(reference(packed), inputs, cotangents, dtype="float64")
    found = numerics.run(in_float32(backend, packed), inputs, cotangents, dtype="float32")
    numerics.assert_close(found, expected, tolerance)


def at_the_limits(kind, log_decay=None, beta=None, length=100):
    """Tokens with the log decays ``log_decay(random, shape)``."""
    random = np.random.default_rng(4)
    q, k, v, state = (numerics.normal(random, *shape) for shape in (*[(1, length, 2, 4)] * 3, (1, 2, 4, 4)))
    if kind == "none":
        log_decay = None
    else:
        shape = {"scalar": (1, length, 2), "channel": q.shape}[kind]
        log_decay = np.asarray(log_decay(random, shape)).astype(np.float32).astype(np.float64)
    drawn = numerics.uniform(random, 1, length, 2)
    beta = drawn if beta is None else np.full_like(drawn, beta)
    return q, unit(k), v, beta, log_decay, state


@pytest.mark.parametrize("backend, kind", [("recurrent", "channel"), ("chunked", "scalar"), ("chunked", "channel")])
def test_strong_and_weak_decays_in_one_chunk(backend, kind):
    mixed = at_the_limits(kind, lambda random, shape: random.choice([-50.0, -1e4, -1e-7, -1e-3, 0.0], shape))
    assert_right_in_float32(backend, mixed)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_nothing_is_lost_behind_strong_decays(kind):
    """Log decays are -50 per step in most of a chunk and small at its end: a difference of two sums would lose these."""
    inputs = at_the_limits(kind, lambda _, shape: np.full(shape, -50.0))
    inputs[4][:, 50:] = -0.01
    assert_right_in_float32("chunked", inputs)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
@pytest.mark.parametrize("value", [-1e-7, -50.0, -np.inf])
def test_one_decay_for_all(kind, value):
    assert_right_in_float32("chunked", at_the_limits(kind, lambda _, shape: np.full(shape, value)))


@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_all_keys_equal(kind, beta):
    """All keys are one of four channels, so that their length is exactly 1. With beta = 2 each write reflects the state:
    rounding of the decays between a chunk's tokens then adds up over its pairs, to 3e-5 here."""
    q, k, v, beta, log_decay, state = at_the_limits(kind, lambda random, shape: -random.uniform(0, 0.01, shape), beta)
    k = np.zeros_like(k)
    k[..., 1] = 1
    mirrors = np.all(beta == 2) and kind != "none"
    assert_right_in_float32("chunked", (q, k, v, beta, log_decay, state), tolerance=5e-5 if mirrors else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_almost_equal_keys(backend):
    q, k, v, beta, _, state = at_the_limits("none", beta=1.0)
    k = k[:, :1] + 1e-3 * k
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    assert_right_in_float32(backend, (q, k.astype(np.float32).astype(np.float64), v, beta, None, state))


@pytest.mark.parametrize("beta", [None, 1.0])
def test_a_thousand_writes_at_one_key(beta):
    q, k, v, beta, _, state = at_the_limits("none", beta=beta, length=1_000)
    assert_right_in_float32("chunked", (q, k[:, :1] + np.zeros_like(k), v, beta, None, state))


@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
def test_zeros(kind):
    *inputs, log_decay, state = at_the_limits(kind, lambda _, shape: np.zeros(shape))
    inputs, state = [np.zeros_like(x) for x in inputs], np.zeros_like(state)
    assert_right_in_float32("chunked", (*inputs, log_decay, state))


@pytest.mark.parametrize("backend, kind", [("recurrent", "channel"), ("chunked", "scalar"), ("chunked", "channel")])
def test_one_document_a_token(backend, kind):
    inputs = at_the_limits(kind, lambda random, shape: -random.uniform(0, 1, shape))
    assert_right_in_float32(backend, inputs, packed=True)


@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
def test_65536_tokens_in_float32(kind):
    random = np.random.default_rng(5)
    q, k, v = (numerics.normal(random, 1, 65_536, 1, 2) for _ in range(3))
    state, beta = numerics.normal(random, 1, 1, 2, 2), numerics.uniform(random, 1, 65_536, 1)
    log_decay = None
    if kind != "none":
        shape = q.shape if kind == "channel" else q.shape[:3]
        log_decay = (-np.exp(random.uniform(-20, 3, shape))).astype(np.float32).astype(np.float64)
    assert_right_in_float32("chunked", (q, unit(k), v, beta, log_decay, state))


# Memory


@pytest.mark.parametrize("kind, chunk", [("none", 64), ("channel", 32)])
def test_memory_grows_with_the_inputs_and_a_state_a_chunk(kind, chunk):
    heads, width = 2, 32

    def temporaries(length):
        array = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)
        inputs = [array, array, array, jax.ShapeDtypeStruct(array.shape[:3], jnp.float32)]
        inputs += [] if kind == "none" else [array]
        objective = lambda *inputs: jnp.sum(delta_rule(*inputs)[0] ** 2)  # noqa: E731
        compiled = numerics.jit(jax.grad(objective, tuple(range(len(inputs))))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(8_192), temporaries(16_384)
    assert long < 2.02 * short
    # Besides the states before each chunk there are only a few arrays like the inputs, each a 32nd of all tokens' states.
    assert long < 16_384 * heads * width * width * 4 * (1 / chunk + 5 / width)


# What is chosen and what is refused


def test_auto_takes_chunks_for_more_than_a_few_tokens():
    inputs = numerics.cast(case("scalar")[0], "float32")
    runs = {name: numerics.jit(functools.partial(delta_rule, backend=name)) for name in ("auto", *BACKENDS)}
    for length, chosen in ((1, "recurrent"), (8, "recurrent"), (9, "chunked")):
        texts = {name: run.lower(*(x[:, :length] for x in inputs[:5])).as_text() for name, run in runs.items()}
        assert texts["auto"] == texts[chosen]
        assert texts["recurrent"] != texts["chunked"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "associative"}, "delta_rule has no backend 'associative'; it has 'auto', 'recurrent', 'chunked'"),
        ({"backend": "recurrent", "chunk_size": 4}, "delta_rule: chunk_size=4 is for backend='chunked'"),
        ({"chunk_size": 0}, "delta_rule: chunk_size=0 must be a whole number of tokens, at least 1"),
        (
            {"beta": np.ones((1, 9, 2, 1))},
            r"delta_rule: beta \(1, 9, 2, 1\) does not fit queries .*; it must be \[B, T, H\]",
        ),
        (
            {"log_decay": np.zeros(2)},
            r"delta_rule: log_decay \(2,\) does not fit .*; it must be \[B, T, H\] or \[B, T, H, K\]",
        ),
        ({"k": np.ones((1, 9, 2, 4))}, r"delta_rule: keys \(1, 9, 2, 4\) do not have the shape of the queries"),
        (
            {"k": np.ones((1, 9, 2, 2, 3)), "v": np.ones((1, 9, 2, 2, 4)), "beta": np.ones((1, 9, 2, 3))},
            r"delta_rule: keys .*, values .* and beta \(1, 9, 2, 3\) differ in the number of updates per token; "
            r"they must be \[B, T, ",
        ),
        (
            {"k": np.ones((1, 9, 2, 0, 3))},
            r"delta_rule: keys \(1, 9, 2, 0, 3\), .* differ in the number of "
            r"updates per token",
        ),
        (
            {"initial_state": np.ones((1, 2, 3, 3))},
            r"delta_rule: the initial state is \(1, 2, 3, 3\), not \[B, H, K, V\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q = np.ones((1, 9, 2, 3), np.float32)
    arguments = {"q": q, "k": q, "v": np.ones((1, 9, 2, 4), np.float32), "beta": np.ones((1, 9, 2), np.float32)}
    with pytest.raises(UserError, match=message):
        delta_rule(**(arguments | change))


def like_keys(beta):
    """256 tokens: queries, one shared key and values in bfloat16, and beta."""
    random = np.random.default_rng(0)
    q, v, key = (
        random.standard_normal((1, 256, 1, 64)),
        random.standard_normal((1, 256, 1, 64)),
        random.standard_normal(64),
    )
    k = np.broadcast_to(key / np.linalg.norm(key), q.shape)
    return *(jnp.asarray(x, jnp.bfloat16) for x in (q / 8, k, v)), jnp.full((1, 256, 1), beta, jnp.float32)


@pytest.mark.parametrize("beta", [1.0, 1.9, 2.0])
def test_negative_eigenvalues_keep_their_digits_where_keys_are_alike(beta):
    """In chunks, and in the kernel, which at beta = 2 loses digits unless ``negative_eigenvalues`` is set."""
    given = like_keys(beta)
    with jax.enable_x64(True):
        expected = np.asarray(delta_rule(*(x.astype(jnp.float64) for x in given), backend="recurrent")[0])

    def error(**options):
        o, _ = delta_rule(*given, **options)
        return np.linalg.norm(np.asarray(o, np.float64) - expected) / np.linalg.norm(expected)

    assert error(backend="chunked", negative_eigenvalues=True) < 0.03
    if beta == 2.0:
        assert error(backend="pallas", negative_eigenvalues=True) < 0.03
        assert error(backend="pallas") > 0.3


@pytest.mark.parametrize("platform, kind", [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100 80GB HBM3")])
def test_negative_eigenvalues_have_a_kernel(platform, kind):
    x = jnp.ones((1, 9, 2, 256), jnp.bfloat16)
    with backends.use_platform(platform, kind):
        assert choose(x, x, x, negative_eigenvalues=True).is_kernel
        assert choose(x, x, x, chunk_size=64).is_kernel
        if platform == "gpu":  # the inverse of 64 tokens, then in two terms, finds no registers beside 256 keys
            assert choose(x, x, x, chunk_size=64, negative_eigenvalues=True).name == "chunked"
            with pytest.raises(UserError, match="chunks of a power of two from 16 to 32 tokens, not of 64"):
                choose(x, x, x, chunk_size=64, backend="pallas", negative_eigenvalues=True)
