"""linear_cross_entropy and token_losses against the oracle and the naive log-softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import cross_entropy
from jaxlinear.ops.cross_entropy import linear_cross_entropy, token_losses
from tests import naive, numerics, oracles

# name: B, T, D, vocab, soft cap, z loss, groups, elements per slice
CASES = {
    "one_token": (1, 1, 3, 11, 0.0, 0.0, 1, None),
    "plain": (3, 7, 4, 11, 0.0, 0.0, 1, None),
    "soft_cap": (3, 7, 4, 11, 2.0, 0.0, 1, None),
    "z_loss": (3, 7, 4, 11, 0.0, 0.3, 1, None),
    "groups": (4, 7, 4, 11, 0.0, 0.0, 2, None),
    "slices": (3, 64, 4, 11, 0.0, 0.0, 1, 3 * 16 * 11),
    "slices_that_do_not_divide": (2, 7, 4, 13, 0.0, 0.1, 1, 40),
    "a_slice_a_token": (1, 7, 4, 13, 0.0, 0.0, 1, 1),
    "everything": (4, 100, 5, 13, 1.5, 0.2, 4, 4 * 30 * 13),
}


@functools.cache
def case(name):
    batch, length, width, vocab, soft_cap, z_loss, _, _ = CASES[name]
    random = np.random.default_rng(length)
    x, embedding = numerics.normal(random, batch, length, width), numerics.normal(random, vocab, width)
    targets = random.integers(0, vocab, (batch, length)).astype(np.int32)
    targets.flat[0] = vocab - 1
    weights = numerics.uniform(random, batch, length) * (random.random((batch, length)) < 0.7)
    weights.flat[0] = 0.25
    options = {"soft_cap": soft_cap, "z_loss": z_loss}
    nll, objective, losses = oracles.linear_cross_entropy(x, embedding, targets, weights, **options)

    def value(x, embedding):
        return naive.linear_cross_entropy(x, embedding, jnp.asarray(targets), jnp.asarray(weights), **options)

    def gradient(x, embedding):
        return value(x, embedding), jax.grad(lambda *p: value(*p)[1], argnums=(0, 1))(x, embedding)

    naive_values, gradients = numerics.run(numerics.jit(gradient), x, embedding, dtype="float64")
    numerics.assert_close(naive_values, (nll, objective), 1e-12)
    return x, embedding, targets, weights, (nll, objective), losses, numerics.wide(gradients)


def set_slice(monkeypatch, elements):
    if elements is not None:
        monkeypatch.setattr(cross_entropy, "_SLICE_ELEMENTS", {"cpu": elements})


@pytest.mark.parametrize("name, dtype", numerics.each_dtype(CASES, "soft_cap", "z_loss", "everything"))
def test_values_and_gradients(monkeypatch, name, dtype):
    x, embedding, targets, weights, values, losses, gradients = case(name)
    *_, soft_cap, z_loss, groups, elements = CASES[name]
    set_slice(monkeypatch, elements)

    @numerics.jit
    def run(x, embedding, weights):
        def objective(x, embedding):
            options = {"soft_cap": soft_cap, "z_loss": z_loss, "groups": groups}
            nll, objective = linear_cross_entropy(x, embedding, jnp.asarray(targets), weights, **options)
            return 3 * objective + 5 * nll, (nll, objective)  # nll has a value but no gradient

        gradients, values = jax.grad(objective, argnums=(0, 1), has_aux=True)(x, embedding)
        plain = linear_cross_entropy(x, embedding, jnp.asarray(targets), weights, soft_cap=soft_cap, z_loss=z_loss)
        each = token_losses(x, embedding, jnp.asarray(targets), soft_cap=soft_cap)
        return values, gradients, plain, each

    with jax.enable_x64(dtype == "float64"):
        weights = jnp.asarray(weights, "float64" if dtype == "float64" else "float32")
        found, found_gradients, plain, each = run(*numerics.cast((x, embedding), dtype), weights)
    numerics.assert_close(found, values, numerics.TOLERANCES[dtype])
    numerics.assert_close(plain, values, numerics.TOLERANCES[dtype])
    numerics.assert_close(each, losses, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, jax.tree.map(lambda y: 3 * y, gradients), numerics.TOLERANCES[dtype])
    assert all(y.dtype == weights.dtype for y in (*found, each))
    assert all(y.dtype == dtype for y in found_gradients)


@pytest.mark.parametrize("elements", [None, 40])
def test_bfloat16_as_programs_compile_it(monkeypatch, elements):
    """With its default options, XLA for CPUs lacks some products of bfloat16. Tested with one slice and with many."""
    x, embedding, targets, weights, _, _, gradients = case("plain")
    set_slice(monkeypatch, elements)
    loss = lambda *p: linear_cross_entropy(*p, jnp.asarray(targets), jnp.asarray(weights, "float32"))[1]  # noqa: E731
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x, "bfloat16"), jnp.asarray(embedding, "float32"))
    numerics.assert_close(found, gradients, numerics.TOLERANCES["bfloat16"])
    assert [y.dtype for y in found] == ["bfloat16", "float32"]


@pytest.mark.parametrize("name", ["soft_cap", "slices", "everything"])
def test_losses_of_bfloat16_are_those_of_float32(monkeypatch, name):
    """Inputs are exact in bfloat16, and no logit is rounded to it: a trained model's logits are around 10, so that losses
    would have two correct digits at most."""
    x, embedding, targets, weights, values, losses, _ = case(name)
    *_, soft_cap, z_loss, groups, elements = CASES[name]
    set_slice(monkeypatch, elements)

    @numerics.jit
    def run(x, embedding, weights):
        options = {"soft_cap": soft_cap, "groups": groups}
        each = token_losses(x, embedding, jnp.asarray(targets), **options)
        return linear_cross_entropy(x, embedding, jnp.asarray(targets), weights, z_loss=z_loss, **options), each

    found, each = run(jnp.asarray(x, "bfloat16"), jnp.asarray(embedding, "float32"), jnp.asarray(weights, "float32"))
    numerics.assert_close(found, values, numerics.TOLERANCES["float32"])
    numerics.assert_close(each, losses, numerics.TOLERANCES["float32"])


@pytest.mark.parametrize("elements", [None, 1])
def test_the_gradient_of_a_frequent_token_is_summed_in_float32(monkeypatch, elements):
    """In one slice and over slices: bfloat16 has no 257, and a bfloat16 sum of halves stops growing at 128."""
    set_slice(monkeypatch, elements)
    targets, weights = jnp.zeros((1, 514), jnp.int32), jnp.ones((1, 514))
    loss = lambda embedding: linear_cross_entropy(jnp.ones((1, 514, 1), "bfloat16"), embedding, targets, weights)[1]  # noqa: E731
    assert numerics.jit(jax.grad(loss))(jnp.zeros((2, 1)))[:, 0].tolist() == [-257, 257]


def test_gradients_are_those_of_finite_differences():
    random = np.random.default_rng(0)
    x, embedding = random.standard_normal((2, 5, 3)), random.standard_normal((7, 3))
    targets, weights = random.integers(0, 7, (2, 5)).astype(np.int32), random.random((2, 5))
    options = {"soft_cap": 1.7, "z_loss": 0.2}

    def objective(x, embedding):
        return oracles.linear_cross_entropy(x, embedding, targets, weights, **options)[1]

    def gradient(x, embedding, targets, weights):
        loss = lambda *p: linear_cross_entropy(*p, targets, weights, **options)[1]  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(x, embedding)

    gradients = numerics.run(numerics.jit(gradient), x, embedding, targets, weights, dtype="float64")
    for position in range(2):
        directions = [random.standard_normal(y.shape) * (i == position) for i, y in enumerate((x, embedding))]
        expected = numerics.directional_derivative(objective, (x, embedding), directions)
        found = np.sum(directions[position] * np.asarray(gradients[position]))
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_slice_does_not_hold_all_logits(monkeypatch):
    """The program has no array as large as the logits of the whole batch."""
    set_slice(monkeypatch, 2 * 16 * 50)
    shapes = ((2, 64, 4), jnp.float32), ((50, 4), jnp.float32), ((2, 64), jnp.int32), ((2, 64), jnp.float32)

    def gradient(x, embedding, targets, weights):
        return jax.grad(lambda *p: linear_cross_entropy(*p, targets, weights)[1], argnums=(0, 1))(x, embedding)

    text = str(jax.make_jaxpr(gradient)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)))
    assert "f32[2,16,50]" in text
    assert "f32[2,64,50]" not in text and "f32[4,2,16,50]" not in text


def test_logits_of_hundreds_do_not_overflow():
    x, embedding = jnp.full((1, 2, 1), 20.0), jnp.arange(0.0, 40.0, 10.0)[:, None]
    losses = token_losses(x, embedding, jnp.array([[3, 0]]))
    assert losses.tolist() == [[0, 600]]
    gradients = jax.grad(lambda x, embedding: jnp.sum(token_losses(x, embedding, jnp.array([[3, 0]]))), (0, 1))
    assert not any(y.any() for y in gradients(x, embedding))  # they are for evaluation
    weights = jnp.ones((1, 2))
    gradient = jax.grad(lambda x: linear_cross_entropy(x, embedding, jnp.array([[3, 0]]), weights)[1])(x)
    assert gradient[0, :, 0].tolist() == [0, 30]


def test_no_target_is_no_loss():
    x, embedding, targets, *_ = case("plain")
    x, embedding = numerics.cast((x, embedding), "float32")
    run = lambda x: linear_cross_entropy(x, embedding, jnp.asarray(targets), jnp.zeros(targets.shape))  # noqa: E731
    assert [y.item() for y in run(x)] == [0, 0]
    assert not jax.grad(lambda x: run(x)[1])(x).any()
