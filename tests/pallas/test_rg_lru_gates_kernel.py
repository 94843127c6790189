"""The kernel of the RG-LRU's gates, interpreted, against the products: values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import blocks
from jaxlinear.pallas.rg_lru import equations as rg_lru_equations
from jaxlinear.parallel import operations, sharding
from tests import naive, numerics
from tests.ops.test_rg_lru_gates import draw
from tests.shards import make_mesh

# name: B, T, N, K
CASES = {
    "one_token": (1, 1, 2, 3),
    "several_in_a_register": (2, 20, 16, 32),  # two groups of eight
    "between_registers": (1, 300, 4, 96),  # a group of four in three registers, and three blocks of time
    "griffin": (1, 17, 8, 160),  # two groups
    "whole_registers": (2, 130, 2, 256),
    "last_register_in_part": (2, 40, 2, 160),
    "odd": (1, 40, 3, 77),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "TIME", (256, 128))
    monkeypatch.setattr(blocks, "ROWS", 64)
    monkeypatch.setattr(blocks, "CHANNELS", 256)


@functools.cache
def case(name):
    inputs, first = draw(*CASES[name])
    cotangents = tuple(numerics.normal(np.random.default_rng(1), *inputs[0].shape) for _ in range(2))
    reference = numerics.with_gradients(lambda *inputs: naive.rg_lru_gates(*inputs, first))
    return inputs, first, cotangents, numerics.wide(numerics.run(reference, inputs, cotangents, dtype="float64"))


def check(name, dtype, tolerance):
    inputs, first, cotangents, (outputs, gradients) = case(name)
    run = numerics.with_gradients(lambda *inputs: ops.rg_lru_gates(*inputs, first, backend="pallas"))
    found, found_gradients = numerics.run(run, inputs, cotangents, dtype=dtype)
    assert found[0].dtype == found[1].dtype == ("float64" if dtype == "float64" else "float32")
    assert {y.dtype.name for y in found_gradients} == {dtype}
    numerics.assert_close(found, outputs, tolerance)
    numerics.assert_close(found_gradients, gradients, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    check(name, "float64", 1e-12)


@pytest.mark.parametrize("name", ["several_in_a_register", "between_registers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_numbers(name, dtype):
    check(name, dtype, numerics.TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["between_registers", "last_register_in_part"])
def test_on_a_simulated_tpu(monkeypatch, name):
    """With TPU memories and copies; reads beyond an array or of unwritten memory give NaN."""
    simulated = Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan"))
    monkeypatch.setattr(backends, "target", lambda: simulated)
    check(name, "float32", 1e-5)


def test_one_minus_the_square_to_the_last_digits():
    """In float32, at every a from 0 to 1 - 1e-9, on both sides of where the series ends."""
    at_the_end = rg_lru_equations._NEAR * (1 + np.linspace(-1e-3, 1e-3, 99))
    log2_a = -np.concatenate([[0.0], np.geomspace(1e-9, 100, 20_000), at_the_end]).astype(np.float32)
    found = rg_lru_equations.one_minus_square(jnp.asarray(log2_a), jnp.exp2(jnp.asarray(log2_a)))
    expected = -np.expm1(2 * np.log(2) * log2_a.astype(np.float64))
    assert found[0] == 0
    assert np.max(np.abs(found[1:] / expected[1:] - 1)) < 2e-6


@pytest.mark.parametrize("bias", [-200.0, -18.0, 200.0])
def test_at_every_decay(bias):
    """At -200 a is 1, and at 200 at its smallest; neither depends on the gate. At -18 a is close to 1."""
    (x, kernel, _, *others), first = draw(1, 20, 2, 8)
    inputs, cotangents = (x, kernel, np.full(16, bias), *others), (np.ones(x.shape), np.ones(x.shape))
    run = lambda backend: numerics.with_gradients(lambda *y: ops.rg_lru_gates(*y, first, backend=backend))  # noqa: E731
    found, expected = (numerics.run(run(name), inputs, cotangents, dtype="float32") for name in ("pallas", "products"))
    for y, want in zip(jax.tree.leaves(found), jax.tree.leaves(numerics.wide(expected)), strict=True):
        assert np.max(np.abs(y - want)) <= 1e-5 * max(0.1, np.max(np.abs(want)))


@pytest.mark.parametrize(
    "sizes",
    [{"data": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"data": 2, "sequence": 4}, {"sequence": 2, "tensor": 4}],
    ids=str,
)
def test_on_a_mesh(sizes):
    inputs, first = draw(4, 32, 4, 3)
    cotangents = tuple(numerics.normal(np.random.default_rng(1), *inputs[0].shape) for _ in range(2))
    results = []
    for module, backend in ((ops, "products"), (operations, "pallas")):
        run = numerics.with_gradients(lambda *y, m=module, b=backend: m.rg_lru_gates(*y, jnp.asarray(first), backend=b))
        with sharding.use_mesh(make_mesh(sizes)):
            results.append(numerics.run(run, inputs, cotangents, dtype="float64"))
    numerics.assert_close(results[1], numerics.wide(results[0]), 1e-12)


def test_blocks_that_devices_cannot_have_whole():
    inputs, first = draw(4, 16, 3, 8)
    arguments = *numerics.cast(inputs, "float32"), jnp.asarray(first)
    with sharding.use_mesh(make_mesh({"data": 4, "tensor": 2})):
        with pytest.raises(UserError, match=r"needs whole blocks on each device, and 12 channels are no multiple of 8"):
            operations.rg_lru_gates(*arguments, backend="pallas")
        found = operations.rg_lru_gates(*arguments)
    expected = numerics.run(naive.rg_lru_gates, *inputs, first, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), 1e-5)


def test_second_derivatives_are_refused():
    inputs, first = draw(1, 4, 1, 2)
    x, *others = numerics.cast(inputs, "float32")
    objective = lambda x: jnp.sum(ops.rg_lru_gates(x, *others, jnp.asarray(first), backend="pallas")[1])  # noqa: E731
    with pytest.raises(UserError, match=r"no second derivatives; use backend='products'"):
        jax.grad(lambda x: jnp.sum(jax.grad(objective)(x)))(x)
