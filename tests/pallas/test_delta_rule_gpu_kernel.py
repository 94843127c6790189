"""The delta rule's kernels for GPU, interpreted, tested like those for TPU."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, delta_rule
from jaxlinear.ops.delta_rule.op import choose
from jaxlinear.pallas.parts.target import Target
from tests import numerics
from tests.ops import test_delta_rule as operation
from tests.pallas.test_delta_rule_kernel import (
    ALIKE,
    check,
    check_alike,
    check_without_outputs,
    keys_of_one_sign,
    run_kernel,
)
from tests.pallas.test_linear_attention_kernel import RATE, assert_decays_are_not_rounded

INTERPRETED = Target("gpu", "none", True)
RUNS = [
    ("one_token", "float64", None),
    ("short", "float64", 64),
    ("none_long", "float64", 16),
    ("scalar", "float64", 64),
    ("channel", "float64", None),
    *((name, "bfloat16", None) for name in ("none", "scalar", "channel")),
]


@pytest.mark.slow(cases=["short-float64-64", "scalar-bfloat16-None"])
@pytest.mark.parametrize("name, dtype, chunk", RUNS)
def test_values_and_gradients(name, dtype, chunk):
    check(name, dtype, INTERPRETED, chunk)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_states_of_bfloat16_are_float32(kind):
    operation.assert_states_are_float32(functools.partial(run_kernel, None, INTERPRETED), kind)


@pytest.mark.parametrize("name", ["none_long", "scalar", "channel"])
def test_a_run_without_its_outputs(name):
    check_without_outputs(name, INTERPRETED)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_hard_decays(kind):
    """Decays strong and weak in one chunk, equal for all, or weak only at a chunk's end."""
    hard = [
        lambda random, shape: random.choice([-50.0, -1e4, -1e-7, -1e-3, 0.0], shape),
        *(lambda _, shape, value=value: np.full(shape, value) for value in (-1e-7, -50.0, -np.inf)),
    ]
    every = [operation.at_the_limits(kind, draw) for draw in (*hard, hard[2])]
    every[-1][4][:, 50:] = -0.01
    run, random = numerics.with_gradients(functools.partial(run_kernel, None, INTERPRETED)), np.random.default_rng(3)
    for inputs in every:
        cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[5].shape)
        expected = numerics.run(operation.reference(False), inputs, cotangents, dtype="float64")
        numerics.assert_close(numerics.run(run, inputs, cotangents, dtype="float32"), expected, 1e-5)


def test_keys_alike_in_bfloat16():
    """If all factors of the inverse's products were bfloat16, the error would be 1.5%."""
    (q, k, v, beta), (expected, _) = keys_of_one_sign()
    run = numerics.jit(lambda q, k, v, beta, state: run_kernel(None, INTERPRETED, q, k, v, beta, None, state, chunk=64))
    found, _ = numerics.run(run, q, k, v, beta, np.zeros((1, 1, 16, 16)), dtype="bfloat16")
    error = np.asarray(found, np.float64) - expected
    assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_float32_decays_beside_products_in_bfloat16(kind):
    def run(q, k, v, log_decay, state):
        """Values are scaled so that the first token writes what linear attention would, plus what it replaces."""
        k, v = k / 4, v * float(4 * (1 + np.exp(-RATE)))
        beta = jnp.ones(q.shape[:3])
        return run_kernel(None, INTERPRETED, q, k, v, beta, log_decay, state)

    assert_decays_are_not_rounded(run, kind)


@pytest.mark.slow(but=["turned-2-channel-False"])
@pytest.mark.parametrize("keys, beta, decay, packed", ALIKE[:3])
def test_negative_eigenvalues(keys, beta, decay, packed):
    check_alike(keys, beta, decay, packed, INTERPRETED)


def test_what_it_takes():
    q, beta = jnp.ones((1, 9, 2, 16)), jnp.ones((1, 9, 2))
    narrow = q.astype(jnp.bfloat16)
    with backends.use_platform("gpu", "NVIDIA H100 80GB HBM3"):
        assert numerics.form(choose, "auto", narrow, narrow, narrow) == "pallas"
        assert numerics.form(choose, "auto", q, q, q) == "chunked"
        with pytest.raises(
            UserError, match="delta_rule: the kernel takes bfloat16, not float32; use backend='chunked'"
        ):
            delta_rule(q, q, q, beta, backend="pallas")
        with pytest.raises(UserError, match="chunks of a power of two from 16 to 64 tokens, not of 128"):
            delta_rule(narrow, narrow, narrow, beta, chunk_size=128, backend="pallas")
