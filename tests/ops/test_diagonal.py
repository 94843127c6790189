"""linear_recurrence: cases for the laws, complex numbers, dtypes, exact sums, and inputs at the limits."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import SAVED, linear_recurrence
from jaxlinear.ops.diagonal import loops
from jaxlinear.ops.diagonal import op as diagonal
from tests import naive, numerics, oracles
from tests.ops import cases

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
    batch, length, trailing, reverse, packed, kind_a, kind_x = CASES[name]
    random = np.random.default_rng(length)
    shape = trailing if kind_a.startswith("constant") else (batch, length, *trailing)
    a = numerics.uniform(random, *shape, low=-0.3, high=1.0)
    if kind_a.endswith("complex"):
        a = numerics.representable(0.9 * a) + 1j * numerics.uniform(random, *shape, low=-0.4, high=0.4)
    x = numerics.normal(random, batch, length, *trailing, complex_=kind_x == "complex")
    state = numerics.normal(random, batch, *trailing, complex_="complex" in kind_a + kind_x)
    ids = cases.documents(random, batch, length) if packed else None
    return cases.expected(random, "linear_recurrence", (a, x, state), ids, reverse=reverse)


RUNS = [
    (name, dtype, backend)
    for name, dtype in numerics.each_dtype(CASES, "short", "complex_reverse", "constant_packed", "long")
    for backend in BACKENDS
] + [("long", "float64", "auto")]


def options(name, backend):
    return {"reverse": CASES[name][3], "backend": backend}


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in CASES if "complex" in name])
def test_complex_numbers_as_real_arithmetic(monkeypatch, name, backend):
    """The same values and, by JAX's convention, the same gradients; nothing complex is carried through time."""
    monkeypatch.setattr(loops, "REAL_ARITHMETIC_ON", ("cpu",))
    inputs, cotangents, ids, outputs, gradients = case(name)
    op = functools.partial(linear_recurrence, segment_ids=ids, **options(name, backend))
    for dtype in ("float64", "float32"):
        found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
        numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
        numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    steps = jax.make_jaxpr(loops._steps, static_argnums=(3, 4, 5))
    x = jnp.ones((1, 4, 2), jnp.complex64)
    assert dtypes_of_products(steps(x, x, None, False, backend, False)) == {"c64"}
    assert dtypes_of_products(steps(x, x, None, False, backend, True)) == {"f32"}


def dtypes_of_products(jaxpr):
    return {*re.findall(r":(f32|c64|i32)\[[^]]*\] = mul ", str(jaxpr))} - {"i32"}


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
    run = numerics.jit(functools.partial(linear_recurrence, backend=backend))
    found = numerics.run(run, a, x, state, dtype="float32")
    expected = oracles.linear_recurrence(a, x, state)
    first, second = (jax.tree.map(lambda y, i=i: y[..., i], (found, expected)) for i in (0, 1))
    numerics.assert_close(*first, 1e-5)
    numerics.assert_close(*second, 0)
