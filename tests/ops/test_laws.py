"""What every operation over time promises: values and gradients of the step-by-step oracle, in each of its forms; documents
and initial states; a run cut in two; its family; decays at the limits; and states in float32.

The cases and what one operation alone promises are in its own file.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.ops import backends, protocol
from jaxlinear.ops.delta_rule import op as delta_op
from jaxlinear.ops.diagonal.op import Diagonal
from jaxlinear.ops.linear_attention import op as linear_op
from jaxlinear.ops.selective_scan import family as scan_family
from jaxlinear.ops.selective_scan.op import SelectiveScan
from jaxlinear.pallas.parts.target import Target
from tests import naive, numerics, oracles
from tests.ops import test_attention as attention
from tests.ops import test_convolution as convolution
from tests.ops import test_delta_rule as delta
from tests.ops import test_diagonal as diagonal
from tests.ops import test_linear_attention as linear
from tests.ops import test_selective_scan as scan
from tests.ops import test_sliding_window as windows

MODULES = {
    "linear_attention": linear,
    "delta_rule": delta,
    "selective_scan": scan,
    "linear_recurrence": diagonal,
    "causal_convolution": convolution,
    "causal_attention": attention,
    "sliding_window_attention": windows,
}
ATTENTION = ("causal_attention", "sliding_window_attention")
CHUNKED = ("linear_attention", "delta_rule", "selective_scan")
RECURRENT = {"backend": "recurrent"}
# The forms of each operation, by their options.
FORMS = [
    *(("linear_attention", options) for options in (RECURRENT, {"chunk_size": 4})),
    *(("delta_rule", options) for options in (RECURRENT, {"chunk_size": 5})),
    *(("selective_scan", options) for options in (RECURRENT, {"chunk_size": 4})),
    *(("linear_recurrence", options) for options in (RECURRENT, {"backend": "associative"})),
    ("causal_convolution", {}),
    *((name, options) for name in ATTENTION for options in (RECURRENT, {"backend": "chunked"})),
]
each_form = pytest.mark.parametrize(
    "operation, options", FORMS, ids=lambda x: x if isinstance(x, str) else "_".join(map(str, x.values()))
)


pytestmark = pytest.mark.usefixtures("small_blocks")


# Against the oracles


@pytest.mark.parametrize(
    "operation, name, dtype, backend", [(name, *run) for name, module in MODULES.items() for run in module.RUNS]
)
def test_values_and_gradients(operation, name, dtype, backend):
    inputs, cotangents, ids, outputs, gradients = MODULES[operation].case(name)
    run = functools.partial(getattr(ops, operation), segment_ids=ids, **MODULES[operation].options(name, backend))
    found, found_gradients = numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    states = "float32" if dtype == "bfloat16" and operation != "causal_convolution" else dtype
    if np.iscomplexobj(jax.tree.leaves(outputs)[0]):
        dtype = states = {"float64": "complex128"}.get(dtype, "complex64")
    assert [y.dtype for y in jax.tree.leaves(found)] == [dtype, states][: len(jax.tree.leaves(found))]


def draw(operation, random, batch, length, kind=None, past=0):
    """Inputs, of which the last is the initial state, except for attention."""
    normal, uniform = random.standard_normal, random.uniform
    if operation == "linear_recurrence":
        return uniform(-1, 1, (batch, length, 2)), normal((batch, length, 2)), normal((batch, 2))
    if operation == "selective_scan":
        return scan.draw(random, batch, length, 3, 2, kind != "of_keys")
    if operation == "causal_convolution":
        return normal((batch, length, 2)), normal((4, 2)), normal(2), normal((batch, 3, 2))
    if operation in ATTENTION:
        keys = past + length
        return normal((batch, length, 4, 3)), normal((batch, keys, 2, 3)), normal((batch, keys, 2, 5))
    q, k = normal((2, batch, length, 2, 3))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    shapes = {"none": None, "constant": (2,), "channel": q.shape}
    log_decay = None if kind == "none" else -np.exp(uniform(-10, 2, shapes[kind or "channel"]))
    # beta is in 0 .. 2, sometimes at either end.
    beta = (np.clip(uniform(-0.2, 2.2, (batch, length, 2)), 0, 2),) if operation == "delta_rule" else ()
    return q, k, normal((batch, length, 2, 2)), *beta, log_decay, normal((batch, 2, 3, 2))


DIFFERENCES = [
    *(("linear_attention", "channel", options) for options in (RECURRENT, {"chunk_size": 4})),
    ("linear_attention", "constant", {"chunk_size": 4}),
    *(("delta_rule", "channel", options) for options in (RECURRENT, {"chunk_size": 4})),
    ("delta_rule", "none", {"chunk_size": 4}),
    *(("selective_scan", kind, {"chunk_size": 4}) for kind in ("rates", "of_keys")),
    *(("linear_recurrence", kind, {"backend": way}) for kind in ("forward", "reverse") for way in diagonal.BACKENDS),
    ("causal_convolution", "", {}),
    *((name, "", {"backend": way}) for name in ATTENTION for way in attention.BACKENDS),
]


@pytest.mark.parametrize("operation, kind, options", DIFFERENCES)
def test_gradients_are_those_of_finite_differences(operation, kind, options):
    """With other options than their defaults."""
    random = np.random.default_rng(0)
    length, past = {"causal_attention": (20, 7), "sliding_window_attention": (9, 2)}.get(operation, (9, 0))
    inputs = draw(operation, random, 2, length, kind, past)
    ids = np.repeat([[0, 0, 0, 0, 0], [1, 2, 1, 3, 1]], [4, 2, past, length - 8, 2], axis=1).astype(np.int32)
    given = {"reverse": True} if kind == "reverse" else {"window": 3} if operation == ATTENTION[1] else {}
    if operation in ("linear_attention", "delta_rule", *ATTENTION):
        given["scale"] = 0.7
    of_oracle = {"window": length + past} | given if operation == ATTENTION[0] else given
    oracle = getattr(oracles, ATTENTION[1] if operation in ATTENTION else operation)
    weights = jax.tree.map(lambda y: random.standard_normal(y.shape), oracle(*inputs, ids=ids, **of_oracle))

    def objective(*inputs):
        return sum(jax.tree.leaves(jax.tree.map(lambda w, y: np.sum(w * y), weights, run_oracle(*inputs))))

    run_oracle = functools.partial(oracle, ids=ids, **of_oracle)
    run = functools.partial(getattr(ops, operation), segment_ids=ids, **given, **options)
    _, gradients = numerics.run(numerics.with_gradients(run), inputs, weights, dtype="float64")
    for place, x in enumerate(inputs):
        if x is not None:
            of_one = lambda y, place=place: objective(*inputs[:place], y, *inputs[place + 1 :])  # noqa: E731
            direction = random.standard_normal(x.shape)
            slope = numerics.directional_derivative(of_one, [x], [direction])
            assert np.sum(direction * np.asarray(gradients[place])) == pytest.approx(slope, rel=1e-6), place


@pytest.mark.parametrize("operation, options", [form for form in FORMS if form[0] not in ATTENTION])
def test_no_initial_state_is_zeros(operation, options):
    random = np.random.default_rng(1)
    inputs = jax.tree.map(numerics.representable, draw(operation, random, 2, 7))
    count = 2 if operation == "causal_convolution" else -1  # nor is there a bias
    run = numerics.jit(functools.partial(getattr(ops, operation), **options))
    found = numerics.run(run, *inputs[:count], dtype="float32")
    zeros = [np.zeros_like(x) for x in inputs[count:]]
    numerics.assert_close(found, numerics.run(run, *inputs[:count], *zeros, dtype="float32"), 0)
    numerics.assert_close(found, getattr(oracles, operation)(*inputs[:count]), 1e-6)


@pytest.mark.parametrize("operation", MODULES)
def test_numpy_arrays_and_lists_of_ids_are_taken(operation):
    """Outside jit as well, with the same results as for JAX arrays."""
    inputs = jax.tree.map(np.float32, draw(operation, np.random.default_rng(0), 1, 5))
    ids = np.array([[1, 1, 1, 2, 2]], np.int32)
    run = functools.partial(getattr(ops, operation), **options_of(operation))
    expected = run(*jax.tree.map(jnp.asarray, inputs), segment_ids=jnp.asarray(ids))
    for given in (ids, ids.tolist()):
        jax.tree.map(np.testing.assert_array_equal, run(*inputs, segment_ids=given), expected)


# Laws, in float64, on rows of random documents, of one, and of one a token

ROWS, LENGTH, WINDOW = 16, 12, 4


def options_of(operation):
    return {"window": WINDOW} if operation == "sliding_window_attention" else {}


@functools.cache
def law(operation, kind=None):
    """Inputs, some of whose decays are zero, and ids."""
    random = np.random.default_rng(0)
    length = 40 if operation == "causal_attention" else LENGTH
    ids = random.integers(0, 3, (ROWS, length))
    ids[8:] = np.cumsum(random.random((8, length)) < 0.2, axis=1) % 3
    ids[0], ids[1] = 0, np.arange(length)
    inputs = draw(operation, random, ROWS, length, kind)
    if operation in ("linear_attention", "delta_rule"):
        inputs[-2][random.random(inputs[-2].shape) < 0.05] = -np.inf
    return inputs, ids.astype(np.int32)


@functools.cache
def jitted(operation, **options):
    run = functools.partial(getattr(ops, operation), **options_of(operation), **options)
    return numerics.jit(lambda inputs, ids: run(*inputs, segment_ids=ids))


def outcome(operation, options, inputs, ids):
    return numerics.wide(numerics.run(jitted(operation, **options), inputs, ids, dtype="float64"))


def of_time(inputs, cut):
    """The inputs with those ``[B, T, ...]`` cut by ``cut``."""
    shape = inputs[0].shape[:2]
    return tuple(cut(x) if x is not None and x.shape[:2] == shape else x for x in inputs)


@pytest.mark.parametrize("operation", CHUNKED)
def test_the_size_of_chunks_changes_nothing(operation):
    expected = outcome(operation, RECURRENT, *law(operation))
    for size in (1, 5, 20):
        numerics.assert_close(outcome(operation, {"chunk_size": size}, *law(operation)), expected, 1e-12)


@each_form
def test_a_run_cut_in_two_is_one_run(operation, options):
    """The second part of attention needs the keys and values before the cut, of a window only the last ones."""
    inputs, ids = law(operation)
    cuts = {"linear_recurrence": (1, 5, 11), "causal_convolution": (1, 5, 11), "causal_attention": (17, 39)}
    for cut in {"sliding_window_attention": (3, 5, 11)}.get(operation, cuts.get(operation, (5,))):
        past, rest = np.s_[:, :cut], np.s_[:, cut:]
        if operation in ATTENTION:
            keys = np.s_[:, cut - (WINDOW - 1) if operation == "sliding_window_attention" else 0 :]
            q, k, v = inputs
            first = outcome(operation, options, (q[past], k[past], v[past]), ids[past])
            second = outcome(operation, options, (q[rest], k[keys], v[keys]), ids[keys])
            found, whole = np.concatenate([first, second], axis=1), outcome(operation, options, inputs, ids)
        else:
            own = ids.copy()
            own[:, cut] = own[:, cut - 1]  # the state passed on belongs to the next token's document
            first, middle = outcome(operation, options, of_time(inputs, operator.itemgetter(past)), own[past])
            inputs_of_rest = *of_time(inputs, operator.itemgetter(rest))[:-1], middle
            second, final = outcome(operation, options, inputs_of_rest, own[rest])
            found, whole = (np.concatenate([first, second], axis=1), final), outcome(operation, options, inputs, own)
        numerics.assert_close(found, whole, 1e-12)


@each_form
def test_packed_documents_are_documents_alone(operation, options):
    inputs, ids = law(operation)
    places = [(row, start, end) for row in range(ROWS) for start, end in numerics.runs(ids[row])]

    def alone(x):
        """Each document at the front of a row of its own, followed by what changes nothing: zeros, or decays of 1."""
        y = np.full((len(places), *x.shape[1:]), operation == "linear_recurrence" and x is inputs[0], float)
        for i, (row, start, end) in enumerate(places):
            y[i, : end - start] = x[row, start:end]
        return y

    given, own_ids = of_time(inputs, alone), None
    if operation not in ATTENTION:
        states = [inputs[-1][row] * (start == 0) for row, start, _ in places]
        given, own_ids = (*given[:-1], np.stack(states)), np.zeros((len(places), LENGTH), np.int32)
    found, expected = (jax.tree.leaves(outcome(operation, options, *x)) for x in ((inputs, ids), (given, own_ids)))
    for (row, start, end), y in zip(places, expected[0], strict=True):
        numerics.assert_close(found[0][row, start:end], y[: end - start], 1e-12)
    if operation not in (*ATTENTION, "causal_convolution"):
        last = [i for i, (_, _, end) in enumerate(places) if end == LENGTH]
        numerics.assert_close(found[1], expected[1][last], 1e-12)


def ways(family, inputs, constants, state, at):
    """Outputs and last state of one run, of two in sequence, and of two whose maps are composed."""
    whole, *parts = (
        family.prepare(jax.tree.map(lambda x, part=part: x[:, part], inputs), constants)
        for part in (slice(None), slice(None, at), slice(at, None))
    )
    first, second = map(family.summarise, parts)
    middle = family.advance(first, state)
    outputs = jnp.concatenate([family.apply(parts[0], state), family.apply(parts[1], middle)], axis=1)
    through = [family.through(whole, state)] if isinstance(family, delta_op.DeltaRule) else []
    return [
        (family.apply(whole, state), family.advance(family.summarise(whole), state)),
        (outputs, family.advance(second, middle)),
        (outputs, family.advance(family.compose(first, second), state)),
        *through,  # the state directly from the run
    ]


@pytest.mark.parametrize(
    "operation, kind",
    [
        *(("linear_attention", kind) for kind in ("channel", "constant")),
        ("delta_rule", "channel"),
        *(("selective_scan", kind) for kind in ("rates", "of_keys")),
    ],
)
def test_the_family_is_the_operation_however_time_is_split(operation, kind):
    inputs, ids = law(operation, kind)

    @numerics.jit
    def run(inputs, ids):
        *arrays, state = inputs
        starts = ops.segments.starts(ids)
        if operation == "selective_scan":
            x, dt, A, B, C = arrays
            made = scan_family.Inputs(x, dt, B[:, :, None], C[:, :, None], starts)
            return ways(SelectiveScan(4), made, A, state, 4)
        if operation == "delta_rule":
            return ways(delta_op.DeltaRule(3**-0.5), delta_op.Inputs(*arrays, starts), None, state, 4)
        q, k, v, log_decay = arrays
        decays, constants, ones = (
            (None, log_decay, jnp.ones_like(starts)) if kind == "constant" else (log_decay, None, None)
        )
        made = linear_op.Inputs(q, k, v, decays, starts, ones)
        return ways(linear_op.LinearAttention(3**-0.5), made, constants, state, 4)

    expected = outcome(operation, RECURRENT, inputs, ids)
    for way in numerics.run(run, inputs, ids, dtype="float64"):
        numerics.assert_close(way, expected, 1e-12)


@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
def test_the_diagonal_family_has_its_gradients_too(constant):
    """Of complex numbers; in some rows the first token begins anew. Also in pieces of 4 tokens. ``starts`` holds floats,
    which have gradients: 1 where a document begins."""
    family, random = Diagonal(), np.random.default_rng(3)
    of_real, of_imaginary = (draw("linear_recurrence", random, ROWS, LENGTH) for _ in range(2))
    a, x, state = (0.7 * y + 0.7j * z for y, z in zip(of_real, of_imaginary, strict=True))
    starts = np.diff(law("linear_recurrence")[1], axis=1, prepend=0) != 0
    starts[:, 0] = np.arange(ROWS) % 2

    def operation(a, x, state, starts):
        state = jnp.where(starts[:, :1] > 0, jnp.zeros_like(state), state)
        return ops.linear_recurrence(a, x, state, segment_ids=jnp.cumsum(starts, axis=1))

    def every_way(a, x, state, starts):
        inputs, constants = ((None, x, starts > 0), a) if constant else ((a, x, starts > 0), None)
        return [*ways(family, inputs, constants, state, 5), protocol.chunked(family, 4, inputs, constants, state)]

    inputs = (a[0, 0] if constant else a, x, state, starts.astype(np.float64))
    cotangents = numerics.cotangents_like(random, (x, state))
    expected = numerics.run(numerics.with_gradients(operation), inputs, cotangents, dtype="float64")
    for number in range(4):
        way = numerics.with_gradients(lambda *inputs, number=number: every_way(*inputs)[number])
        numerics.assert_close(numerics.run(way, inputs, cotangents, dtype="float64"), expected, 1e-12)


# Decays at the limits, in float32


def _weak_behind_strong(_, shape):
    """Strong in most of a chunk and weak at its end: a difference of two sums would lose these."""
    decays = np.full(shape, -50.0)
    decays[:, 50:] = -0.01
    return decays


DECAYS = {
    "strong_and_weak": lambda random, shape: random.choice([-50.0, -1e4, -1e-7, -1e-3, 0.0], shape),
    "weak_behind_strong": _weak_behind_strong,
    "weak": lambda _, shape: np.full(shape, -1e-7),
    "strong": lambda _, shape: np.full(shape, -50.0),
    "nothing_left": lambda _, shape: np.full(shape, -np.inf),
    "one_document_a_token": lambda random, shape: -random.uniform(0, 1, shape),
}
STEPS = {
    "strong_and_weak": lambda random, shape: random.choice([50.0, 1e4, 1e-7, 1e-3, 0.0], shape),
    "zero": lambda _, shape: np.full(shape, 0.0),
    "weak": lambda _, shape: np.full(shape, 1e-7),
    "strong": lambda _, shape: np.full(shape, 1e4),
    "one_document_a_token": lambda random, shape: random.uniform(0, 1, shape),
}
LIMITS = [
    *(("linear_attention", way, kind, "strong_and_weak") for way in linear.BACKENDS for kind in linear.KINDS),
    ("delta_rule", "recurrent", "channel", "strong_and_weak"),
    *((name, "recurrent", "channel", "one_document_a_token") for name in ("linear_attention", "delta_rule")),
    *(("linear_attention", "chunked", "constant", each) for each in ("weak", "strong", "nothing_left")),
    *(
        (name, "chunked", kind, each)
        for name in ("linear_attention", "delta_rule")
        for kind in ("scalar", "channel")
        for each in DECAYS
        if (name, each) != ("linear_attention", "strong_and_weak")
    ),
    *(("selective_scan", "auto", "rates", each) for each in STEPS),
]


@pytest.mark.parametrize("operation, backend, kind, each", LIMITS)
def test_decays_at_the_limits(operation, backend, kind, each):
    decays = (STEPS if operation == "selective_scan" else DECAYS)[each]
    inputs = MODULES[operation].at_the_limits(kind, decays)
    assert_right_in_float32(operation, backend, inputs, each == "one_document_a_token")


def assert_right_in_float32(operation, backend, inputs, packed=False, tolerance=1e-5):
    """Values and gradients against those in float64; ``packed`` makes every token a document."""
    random, last = np.random.default_rng(3), inputs[-1]
    values = inputs[0 if operation == "selective_scan" else 2]
    cotangents = numerics.normal(random, *values.shape), numerics.normal(random, *last.shape)
    expected = numerics.run(MODULES[operation].reference(packed), inputs, cotangents, dtype="float64")
    found = numerics.run(in_float32(operation, backend, packed), inputs, cotangents, dtype="float32")
    numerics.assert_close(found, expected, tolerance)


@functools.cache
def in_float32(operation, backend, packed):
    ids = np.arange(100)[None] if packed else None
    return numerics.with_gradients(functools.partial(getattr(ops, operation), segment_ids=ids, backend=backend))


@pytest.mark.parametrize(
    "operation, kind",
    [
        *(("linear_attention", kind) for kind in ("scalar", "channel")),
        *(("delta_rule", kind) for kind in ("none", "scalar", "channel")),
        ("selective_scan", "rates"),
    ],
)
def test_65536_tokens_in_float32(operation, kind):
    sign = 1 if operation == "selective_scan" else -1
    decays = lambda random, shape: sign * np.exp(random.uniform(-20, 3, shape))  # noqa: E731
    inputs = MODULES[operation].at_the_limits(kind, decays, length=65_536, heads=1, width=2)
    assert_right_in_float32(operation, "auto", inputs)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_equal_keys_and_zeros(kind):
    q, k, v, log_decay, state = linear.at_the_limits(kind, DECAYS["one_document_a_token"])
    for inputs in (
        (q, k[:, :1] + 0 * k, v, log_decay, state),
        jax.tree.map(np.zeros_like, (q, k, v, log_decay, state)),
    ):
        assert_right_in_float32("linear_attention", "chunked", inputs)


# Keys of the delta rule: all alike, almost, and zero


@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_all_keys_equal(kind, beta):
    """All keys are one of four channels, so that their length is exactly 1. With beta = 2 each write reflects the state:
    rounding of the decays between a chunk's tokens then adds up over its pairs, to 3e-5 here."""
    decays = lambda random, shape: -random.uniform(0, 0.01, shape)  # noqa: E731
    q, k, *rest = delta.at_the_limits(kind, decays, beta)
    inputs = q, np.broadcast_to(np.eye(4)[1], k.shape), *rest
    assert_right_in_float32("delta_rule", "chunked", inputs, tolerance=5e-5 if beta == 2 and kind != "none" else 1e-5)


@pytest.mark.parametrize("backend", delta.BACKENDS)
def test_almost_equal_keys(backend):
    q, k, *rest = delta.at_the_limits("none", beta=1.0)
    k = k[:, :1] + 1e-3 * k
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    assert_right_in_float32("delta_rule", backend, (q, k.astype(np.float32).astype(np.float64), *rest))


@pytest.mark.parametrize("beta", [None, 1.0])
def test_a_thousand_writes_at_one_key(beta):
    q, k, *rest = delta.at_the_limits("none", beta=beta, length=1_000)
    assert_right_in_float32("delta_rule", "chunked", (q, k[:, :1] + 0 * k, *rest))


@pytest.mark.parametrize("kind", ["none", "scalar", "channel"])
def test_zeros(kind):
    inputs = delta.at_the_limits(kind, lambda _, shape: np.zeros(shape))
    assert_right_in_float32("delta_rule", "chunked", jax.tree.map(np.zeros_like, inputs))


# What is not rounded to bfloat16


@pytest.mark.parametrize(
    "operation, kinds",
    [
        *(("linear_attention", (kind,)) for kind in ("none", *linear.KINDS)),
        *(("delta_rule", (kind,)) for kind in ("scalar", "channel")),
        ("selective_scan", ()),
    ],
)
@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_states_beside_bfloat16_are_float32(operation, kinds, backend):
    MODULES[operation].assert_states_are_float32(functools.partial(getattr(ops, operation), backend=backend), *kinds)


DECAY_SHAPES = {"constant": (2, 1), "scalar": (1, 40, 2, 1), "channel": (1, 40, 2, 16)}


@pytest.mark.parametrize("way", ["recurrent", "chunked", "tpu", "gpu"])
@pytest.mark.parametrize(
    "operation, decay", [("linear_attention", "constant"), ("linear_attention", "channel"), ("delta_rule", "scalar")]
)
def test_decays_and_states_are_not_rounded_to_the_inputs(monkeypatch, operation, decay, way):
    """If nothing is written, a state shrinks by exp of the sum of the log decays, to float32 accuracy; with these rounded
    to bfloat16 it would be off by up to a hundredth."""
    if way in ("tpu", "gpu"):
        monkeypatch.setattr(backends, "target", lambda: Target(way, "none", True))
    random = np.random.default_rng(0)
    log_decay = np.float32(-random.uniform(0.01, 0.1, DECAY_SHAPES[decay]))
    state = np.float32(random.standard_normal((1, 2, 16, 16)))
    x = jnp.asarray(random.standard_normal((1, 40, 2, 16)), jnp.bfloat16)
    beta = (jnp.full((1, 40, 2), 0.5),) if operation == "delta_rule" else ()
    backend = "pallas" if way in ("tpu", "gpu") else way
    run = functools.partial(getattr(ops, operation), x, 0 * x, x, *beta, backend=backend)
    given = jnp.asarray(log_decay if decay == "channel" else log_decay[..., 0])
    o, final = numerics.jit(lambda *arrays: run(*arrays))(given, jnp.asarray(state))
    total = np.sum(np.broadcast_to(log_decay, (1, 40, 2, log_decay.shape[-1])), axis=1, dtype=np.float64)
    assert o.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    numerics.assert_close(final, np.exp(total)[..., None] * state, 3e-6)


@pytest.mark.parametrize("backend", attention.BACKENDS)
@pytest.mark.parametrize("operation", ATTENTION)
def test_logits_of_hundreds_do_not_overflow(operation, backend):
    """They rise or fall along the keys, so that the largest is in the first block or in the last."""
    q, k, v = (x[:1] for x in law("causal_attention")[0])
    slope = np.linspace(-1, 1, 40)[None, :, None, None]
    inputs = 300 * numerics.representable(q), numerics.representable(k * slope), numerics.representable(v)
    cotangents = np.ones((1, 40, 4, 5))
    window = options_of(operation)
    reference = functools.partial(naive.sliding_window_attention, **{"window": 40} | window)
    expected = numerics.run(numerics.with_gradients(reference), inputs, cotangents, dtype="float64")
    run = numerics.with_gradients(functools.partial(getattr(ops, operation), backend=backend, **window))
    numerics.assert_close(numerics.run(run, inputs, cotangents, dtype="float32"), numerics.wide(expected), 1e-3)
