"""linear_recurrence against the step-by-step oracle, its gradients, its laws, and inputs at the limits."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlinear.errors import UserError
from jaxlinear.ops import SAVED, linear_recurrence, protocol
from jaxlinear.ops.diagonal import loops
from jaxlinear.ops.diagonal import op as diagonal
from tests import naive, numerics, oracles

BACKENDS = ["recurrent", "associative"]
# name: B, T, trailing axes, reverse, segments, kind of a, kind of x
CASES = {
    "one_token": (3, 1, (5,), False, True, "real", "real"),
    "short": (1, 7, (2, 3), False, True, "real", "real"),
    "short_reverse": (3, 7, (4,), True, True, "real", "real"),
    "complex": (1, 7, (3,), False, True, "complex", "complex"),
    "complex_reverse": (3, 7, (3,), True, True, "complex", "complex"),
    "complex_decay": (1, 7, (2,), False, False, "complex", "real"),
    "complex_input": (1, 7, (2,), False, True, "real", "complex"),
    "scalar": (3, 100, (), False, True, "real", "real"),
    "constant": (3, 7, (4,), False, False, "constant", "real"),
    "constant_packed": (1, 64, (4,), True, True, "constant", "real"),
    "constant_complex": (3, 7, (4,), False, True, "constant complex", "real"),
    "constant_complex_reverse": (3, 7, (4,), True, True, "constant complex", "complex"),
    "constant_one_token": (3, 1, (4,), False, True, "constant complex", "complex"),
    "long": (3, 257, (4,), False, True, "real", "real"),
    "long_reverse": (1, 64, (4,), True, True, "real", "real"),
}


@functools.cache
def case(name):
    """Inputs, cotangents and, from the oracles, outputs and gradients."""
    batch, length, trailing, reverse, packed, kind_a, kind_x = CASES[name]
    random = np.random.default_rng(length)
    shape = trailing if kind_a.startswith("constant") else (batch, length, *trailing)
    a = numerics.uniform(random, *shape, low=-0.3, high=1.0)
    if kind_a.endswith("complex"):
        a = numerics.representable(0.9 * a) + 1j * numerics.uniform(random, *shape, low=-0.4, high=0.4)
    x = numerics.normal(random, batch, length, *trailing, complex_=kind_x == "complex")
    state = numerics.normal(random, batch, *trailing, complex_="complex" in kind_a + kind_x)
    ids = np.cumsum(random.random((batch, length)) < 0.08, axis=1, dtype=np.int32) % 2 if packed else None
    outputs = oracles.linear_recurrence(a, x, state, ids, reverse)
    cotangents = numerics.cotangents_like(random, outputs)
    reference = numerics.with_gradients(functools.partial(naive.linear_recurrence, ids=ids, reverse=reverse))
    naive_outputs, gradients = numerics.run(reference, (a, x, state), cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return (a, x, state), cotangents, ids, outputs, numerics.wide(gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, dtype", numerics.each_dtype(CASES, "short", "complex_reverse", "constant_packed", "long")
)
def test_values_and_gradients(name, backend, dtype):
    inputs, cotangents, ids, outputs, gradients = case(name)
    op = functools.partial(linear_recurrence, segment_ids=ids, reverse=CASES[name][3], backend=backend)
    found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    complex_ = {"float64": "complex128"}.get(dtype, "complex64")
    real = {"float64": "float64"}.get(dtype, "float32")
    h, final = found
    assert h.dtype == (complex_ if np.iscomplexobj(outputs[0]) else dtype)
    assert final.dtype == (complex_ if np.iscomplexobj(outputs[0]) else real)


def test_a_number_of_python_is_as_precise_as_x():
    """As an array it would be float64 if JAX has x64 enabled; and NumPy's rules would make whole numbers float64 anyway."""
    for wide in (False, True):
        with jax.enable_x64(wide), warnings.catch_warnings():
            warnings.simplefilter("error")
            x = jnp.ones((1, 2, 3), jnp.float32)
            for a in (0.5, 1, np.ones(3, np.int32), jnp.float32(0.5)):
                h, state = linear_recurrence(a, x)
                assert (h.dtype, state.dtype) == ("float32", "float32")
            assert linear_recurrence(0.5j, x)[1].dtype == "complex64"
            assert linear_recurrence(0.5, x.astype("complex64"))[1].dtype == "complex64"
            if wide:
                assert linear_recurrence(np.full(3, 0.5), x)[1].dtype == "float64"


def test_a_complex_state_of_a_real_recurrence_is_refused():
    x = jnp.ones((1, 2, 3))
    with pytest.raises(UserError, match=r"the initial state is complex, a and x are real; make one of them complex"):
        linear_recurrence(x, x, jnp.full((1, 3), 1j))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in CASES if "complex" in name])
def test_complex_numbers_as_real_arithmetic(monkeypatch, name, backend):
    """The same values and, by JAX's convention, the same gradients; nothing complex is carried through time."""
    monkeypatch.setattr(loops, "REAL_ARITHMETIC_ON", ("cpu",))
    inputs, cotangents, ids, outputs, gradients = case(name)
    op = functools.partial(linear_recurrence, segment_ids=ids, reverse=CASES[name][3], backend=backend)
    for dtype in ("float64", "float32"):
        found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
        numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
        numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    steps = jax.make_jaxpr(loops._steps, static_argnums=(3, 4, 5))
    x = jnp.ones((1, 4, 2), jnp.complex64)
    assert dtypes_of_products(steps(x, x, None, False, backend, False)) == {"complex64"}
    assert dtypes_of_products(steps(x, x, None, False, backend, True)) == {"float32"}


def dtypes_of_products(jaxpr):
    equations = re.findall(r":(f32|c64|i32)\[[^]]*\] = mul ", str(jaxpr))
    return {{"f32": "float32", "c64": "complex64"}[name] for name in equations if name != "i32"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_finite_differences(backend, reverse):
    random = np.random.default_rng(0)
    a, x, state = random.uniform(0.2, 1, (2, 9, 3)), random.standard_normal((2, 9, 3)), random.standard_normal((2, 3))
    ids = np.array([[0] * 9, [1, 1, 1, 2, 2, 1, 1, 1, 1]], np.int32)
    weights = [random.standard_normal(shape) for shape in ((2, 9, 3), (2, 3))]

    def objective(*inputs):
        outputs = oracles.linear_recurrence(*inputs, ids, reverse)
        return sum(np.sum(w * y) for w, y in zip(weights, outputs, strict=True))

    op = functools.partial(linear_recurrence, segment_ids=ids, reverse=reverse, backend=backend)
    _, gradients = numerics.run(numerics.with_gradients(op), (a, x, state), tuple(weights), dtype="float64")
    for position in range(3):
        directions = [random.standard_normal(y.shape) * (i == position) for i, y in enumerate((a, x, state))]
        expected = numerics.directional_derivative(objective, (a, x, state), directions)
        found = np.sum(directions[position] * np.asarray(gradients[position]))
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_initial_state_is_zeros(backend):
    random = np.random.default_rng(1)
    a, x = (numerics.cast(numerics.normal(random, 2, 5, 3), "float32") for _ in range(2))
    found = linear_recurrence(a, x, backend=backend)
    numerics.assert_close(found, linear_recurrence(a, x, jnp.zeros((2, 3)), backend=backend), 0)
    numerics.assert_close(found, oracles.linear_recurrence(numerics.wide(a), numerics.wide(x)), 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_remat_saves_the_states(dtype):
    """One loop forward and one backward; the forward one is not repeated."""
    x = jnp.asarray(numerics.normal(np.random.default_rng(2), 1, 6, 2), dtype)

    def objective(remat):
        op = lambda a, x: linear_recurrence(a, 2 * x, backend="recurrent")[0]  # noqa: E731
        op = jax.checkpoint(op, policy=jax.checkpoint_policies.save_only_these_names(*SAVED)) if remat else op
        return lambda a, x: jnp.sum(jnp.abs(op(a, x)) ** 2)

    gradients = [jax.grad(objective(remat), (0, 1)) for remat in (True, False)]
    numerics.assert_close(*(jax.jit(gradient)(0.5 * x, x) for gradient in gradients), 1e-6)
    assert str(jax.make_jaxpr(gradients[0])(0.5 * x, x)).count("scan[") == 2


# Laws, on [1, 12, 2] in float64, so that each function is compiled once for each length.

LENGTH = 12
some_ids = st.lists(st.integers(0, 2), min_size=LENGTH, max_size=LENGTH).map(lambda ids: np.array([ids], np.int32))
seeds = st.integers(0, 1000)
law = settings(max_examples=15, deadline=None, derandomize=True)
OPS = {
    (backend, reverse): numerics.jit(
        lambda a, x, state, ids, backend=backend, reverse=reverse: linear_recurrence(
            a, x, state, segment_ids=ids, reverse=reverse, backend=backend
        )
    )
    for backend in BACKENDS
    for reverse in (False, True)
}


def law_inputs(seed):
    random = np.random.default_rng(seed)
    return random.uniform(-1, 1, (1, LENGTH, 2)), random.standard_normal((1, LENGTH, 2)), random.standard_normal((1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, ids=some_ids, cut=st.sampled_from([1, 5, 11]))
@law
def test_a_run_cut_in_two_is_one_run(backend, seed, ids, cut):
    a, x, state = law_inputs(seed)
    ids[:, cut] = ids[:, cut - 1]  # the state passed on belongs to the next token's document
    op = OPS[backend, False]
    whole = numerics.run(op, a, x, state, ids, dtype="float64")
    first, middle = numerics.run(op, a[:, :cut], x[:, :cut], state, ids[:, :cut], dtype="float64")
    second, final = numerics.run(op, a[:, cut:], x[:, cut:], np.asarray(middle), ids[:, cut:], dtype="float64")
    numerics.assert_close((np.concatenate([first, second], axis=1), final), whole, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, ids=some_ids)
@law
def test_packed_documents_are_documents_alone(backend, seed, ids):
    a, x, state = law_inputs(seed)
    h, final = numerics.run(OPS[backend, False], a, x, state, ids, dtype="float64")
    for start, end in numerics.runs(ids[0]):
        # Alone at the front of its row, followed by a = 1 and x = 0, which keep its last state.
        alone_a, alone_x = np.ones_like(a), np.zeros_like(x)
        alone_a[:, : end - start], alone_x[:, : end - start] = a[:, start:end], x[:, start:end]
        alone_state = state if start == 0 else np.zeros_like(state)
        alone = numerics.run(OPS[backend, False], alone_a, alone_x, alone_state, np.zeros_like(ids), dtype="float64")
        numerics.assert_close(h[:, start:end], alone[0][:, : end - start], 1e-12)
    numerics.assert_close(final, alone[1], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=seeds, ids=some_ids)
@law
def test_reversing_time_twice_changes_nothing(backend, seed, ids):
    a, x, state = law_inputs(seed)
    h, final = numerics.run(OPS[backend, False], a, x, state, ids, dtype="float64")
    turned = [np.flip(y, 1) for y in (a, x)]
    h_turned, final_turned = numerics.run(OPS[backend, True], *turned, state, np.flip(ids, 1), dtype="float64")
    numerics.assert_close((np.flip(h_turned, 1), final_turned), (h, final), 1e-12)


@functools.cache
def ways(constant):
    """Functions of ``(a, x, state, starts)`` with gradients: the operation, then the family in one run, in two whose maps
    are composed, and in pieces of 4 tokens. ``starts`` holds floats, which have gradients: 1 where a document begins."""
    family = diagonal.Diagonal()

    def prepare(a, x, starts):
        return family.prepare((None, x, starts > 0), a) if constant else family.prepare((a, x, starts > 0), None)

    def operation(a, x, state, starts):
        state = jnp.where(starts[:, :1] > 0, jnp.zeros_like(state), state)
        return linear_recurrence(a, x, state, segment_ids=jnp.cumsum(starts, axis=1))

    def one_run(a, x, state, starts):
        run = prepare(a, x, starts)
        return family.apply(run, state), family.advance(family.summarise(run), state)

    def two_runs(a, x, state, starts):
        runs = [prepare(a if constant else a[:, part], x[:, part], starts[:, part]) for part in (PAST, REST)]
        first, second = (family.summarise(run) for run in runs)
        outputs = [family.apply(runs[0], state), family.apply(runs[1], family.advance(first, state))]
        return jnp.concatenate(outputs, axis=1), family.advance(family.compose(first, second), state)

    def pieces(a, x, state, starts):
        inputs, constants = ((None, x, starts > 0), a) if constant else ((a, x, starts > 0), None)
        return protocol.chunked(family, 4, inputs, constants, state)

    return [numerics.with_gradients(way) for way in (operation, one_run, two_runs, pieces)]


PAST, REST = slice(None, 5), slice(5, None)


@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@given(seed=seeds, ids=some_ids, anew=st.booleans())
@settings(law, max_examples=8)
def test_the_family_is_the_operation_however_time_is_split(constant, seed, ids, anew):
    random = np.random.default_rng(seed)
    a, x, state = (0.7 * y + 0.7j * z for y, z in zip(law_inputs(seed), law_inputs(seed + 1), strict=True))
    starts = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    starts[:, 0] = anew
    inputs = (a[0, 0] if constant else a, x, state, starts.astype(np.float64))
    cotangents = numerics.cotangents_like(random, (x, state))
    operation, *others = (numerics.run(way, inputs, cotangents, dtype="float64") for way in ways(constant))
    for other in others:
        numerics.assert_close(other, operation, 1e-12)


def test_a_map_does_not_grow_with_its_run():
    family = diagonal.Diagonal()
    summary = lambda *inputs: family.summarise(family.prepare(inputs, None))  # noqa: E731
    for length in (1, 9):
        x = jax.ShapeDtypeStruct((2, length, 3), jnp.bfloat16)
        maps = jax.eval_shape(summary, x, x, jax.ShapeDtypeStruct((2, length), bool))
        assert [(leaf.shape, leaf.dtype) for leaf in maps] == [((2, 3), jnp.float32)] * 2


@pytest.mark.parametrize("backend", [*BACKENDS, "pallas"])
def test_a_state_is_not_rounded_to_the_inputs(backend):
    """A state that neither decays nor is added to stays the same, to the last bit of float32."""
    state = np.float32(np.random.default_rng(2).standard_normal((2, 3)))
    x = jnp.zeros((2, 20, 3), jnp.bfloat16)
    for a in (jnp.ones_like(x), jnp.ones((3,), jnp.bfloat16), jnp.ones_like(x, jnp.float32)):
        h, final = linear_recurrence(a, x, jnp.asarray(state), backend=backend)
        assert h.dtype == jnp.bfloat16 and np.array_equal(final, state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_zero_forgets_and_one_sums(backend, reverse):
    """Whole numbers, so that float32 is exact."""
    x = jnp.asarray(np.random.default_rng(2).integers(-9, 9, (2, 100, 3)), jnp.float32)
    state = jnp.full((2, 3), 5.0)
    run = functools.partial(linear_recurrence, reverse=reverse, backend=backend)
    last = 0 if reverse else -1
    h, final = run(jnp.zeros_like(x), x, state)
    assert np.array_equal(h, x) and np.array_equal(final, x[:, last])
    h, final = run(jnp.ones_like(x), x, state)
    sums = np.flip(np.cumsum(np.flip(x, 1), axis=1), 1) if reverse else np.cumsum(x, axis=1)
    assert np.array_equal(h, sums + 5) and np.array_equal(final, sums[:, last] + 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_used_again_names_another_document(backend):
    ones = jnp.ones((1, 6, 1))
    h, final = linear_recurrence(
        ones, ones, 10 * ones[:, 0], segment_ids=jnp.array([[1, 1, 2, 2, 1, 1]]), backend=backend
    )
    assert h[0, :, 0].tolist() == [11, 12, 1, 2, 1, 2]
    assert final.tolist() == [[2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_document_a_token(backend):
    x = jnp.arange(1.0, 8.0)[None, :, None]
    ids = jnp.arange(7)[None]
    h, _ = linear_recurrence(jnp.ones_like(x), x, jnp.full((1, 1), 10.0), segment_ids=ids, backend=backend)
    assert h[0, :, 0].tolist() == [11, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("a", [1.0, np.exp(-50.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_at_the_limits_have_right_gradients(backend, a):
    random = np.random.default_rng(3)
    inputs = np.full((1, 50, 2), a), numerics.normal(random, 1, 50, 2), numerics.normal(random, 1, 2)
    cotangents = numerics.normal(random, 1, 50, 2), numerics.normal(random, 1, 2)
    expected = numerics.run(numerics.with_gradients(naive.linear_recurrence), inputs, cotangents, dtype="float64")
    op = functools.partial(linear_recurrence, backend=backend)
    found = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype="float32")
    numerics.assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_65536_tokens_in_float32(backend):
    random = np.random.default_rng(4)
    a = numerics.uniform(random, 1, 65_536, 2, low=0.9, high=1.0)
    x, state = numerics.normal(random, *a.shape), numerics.normal(random, 1, 2)
    # The second channel sums whole numbers, which is exact in float32.
    a[..., 1], x[..., 1], state[..., 1] = 1, random.integers(-3, 4, 65_536), 2
    found = numerics.run(
        numerics.jit(functools.partial(linear_recurrence, backend=backend)), a, x, state, dtype="float32"
    )
    expected = oracles.linear_recurrence(a, x, state)
    first, second = (jax.tree.map(lambda y, i=i: y[..., i], (found, expected)) for i in (0, 1))
    numerics.assert_close(*first, 1e-5)
    numerics.assert_close(*second, 0)


def test_auto_is_one_of_the_backends():
    random = np.random.default_rng(6)
    a, x = (numerics.cast(numerics.normal(random, 1, 20, 2), "float32") for _ in range(2))
    numerics.assert_close(linear_recurrence(a, x), linear_recurrence(a, x, backend="recurrent"), 1e-5)


def test_an_unknown_backend_is_refused():
    x = jnp.ones((1, 2, 1))
    with pytest.raises(UserError, match="linear_recurrence has no backend 'chunked'; it has 'auto', 'rec"):
        linear_recurrence(x, x, backend="chunked")


@pytest.mark.parametrize(
    "a, state, message",
    [
        ((2, 5, 1), (2, 3), r"a \(2, 5, 1\) does not fit x \(2, 5, 3\); it must be \[B, T, ...\] or \[...\]"),
        ((5, 3), (2, 3), r"a \(5, 3\) does not fit"),
        ((2,), (2, 3), r"a \(2,\) does not fit"),
        ((3,), (1, 3), r"the initial state is \(1, 3\), not \[B, ...\] = \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(a, state, message):
    with pytest.raises(UserError, match=message):
        linear_recurrence(jnp.ones(a), jnp.ones((2, 5, 3)), jnp.ones(state))
