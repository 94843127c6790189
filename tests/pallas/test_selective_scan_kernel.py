"""The selective scan's kernels for TPU and GPU, interpreted, against the loop over time: values, last states and all
gradients."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlinear import log_once
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, protocol, selective_scan
from jaxlinear.ops.selective_scan import family
from jaxlinear.ops.selective_scan.family import Inputs, SelectiveScanKernel
from jaxlinear.ops.selective_scan.op import SelectiveScan, choose
from jaxlinear.pallas.parts.target import Target
from tests import naive, numerics
from tests.ops import test_selective_scan as operation

PLATFORMS = ["tpu", "gpu"]
# name: B, T, D, N, what else it has
CASES = {
    "one_token": (2, 1, 1, 1, "packed"),
    "short": (2, 7, 100, 5, "packed of_keys"),
    "plain": (1, 64, 32, 16, ""),
    "of_keys": (1, 100, 3, 4, "of_keys"),
    "packed": (1, 100, 160, 3, "packed"),
    "blocks": (2, 257, 100, 2, "packed"),
    "blocks_of_keys": (1, 300, 5, 9, "packed of_keys"),
    "many_numbers": (1, 70, 40, 33, "packed"),  # several programs on GPU
}


def target(platform, interpret=True):
    return Target(platform, "none", interpret)


@functools.cache
def case(name):
    """Inputs, start marks, cotangents and, from the loop in float64, outputs and gradients."""
    batch, length, width, states, kinds = CASES[name]
    random = np.random.default_rng(length + width)
    x, (B, C) = numerics.normal(random, batch, length, width), numerics.normal(random, 2, batch, length, states)
    dt = numerics.representable(np.exp(random.uniform(-7, 1, x.shape)))
    A = None if "of_keys" in kinds else -numerics.uniform(random, width, states, low=0.5, high=3)
    if A is None:
        dt = numerics.representable(dt / (1 + dt * np.sum(B**2, axis=-1, keepdims=True)))
    state = numerics.normal(random, batch, width, states)
    ids = np.cumsum(random.random((batch, length)) < 0.1, axis=1, dtype=np.int32) % 2 if "packed" in kinds else None
    inputs, cotangents = (x, dt, A, B, C, state), tuple(numerics.normal(random, *y.shape) for y in (x, state))
    loop = numerics.with_gradients(functools.partial(naive.selective_scan, ids=ids))
    outputs, gradients = numerics.run(loop, inputs, cotangents, dtype="float64")
    return inputs, ids, cotangents, numerics.wide(outputs), numerics.wide(gradients)


def starts(ids):
    return None if ids is None else jnp.asarray(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0)


def run_kernel(ids, target, x, dt, A, B, C, state):
    none = family.no_state(x, dt, A, B, C)
    inputs = Inputs(x, dt, B[:, :, None], C[:, :, None], starts(ids))
    kernel = SelectiveScanKernel(target)
    return kernel.through(kernel.prepare(inputs, A), state.astype(none.dtype))


def check(name, target, dtype):
    inputs, ids, cotangents, outputs, gradients = case(name)
    kernel = functools.partial(run_kernel, ids, target)
    found, found_gradients = numerics.run(numerics.with_gradients(kernel), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert {y.dtype.name for y in (found[0], *(y for y in found_gradients if y is not None))} == {dtype}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_states_beside_bfloat16_are_float32(platform):
    operation.assert_states_are_float32(functools.partial(run_kernel, None, target(platform)))


@pytest.mark.slow(but_nth=3)  # TPU and GPU in turn
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(small_blocks, name, platform):
    check(name, target(platform), "float64")


@pytest.mark.slow(cases=["short-float32-gpu"])
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name, dtype", [("blocks", "bfloat16"), ("short", "float32")])
def test_narrow_numbers(small_blocks, name, dtype, platform):
    check(name, target(platform), dtype)


@pytest.mark.slow(but=["blocks_of_keys"])
@pytest.mark.parametrize("name", ["packed", "blocks_of_keys"])
def test_on_a_simulated_tpu(small_blocks, name):
    """With TPU memories and copies; reads beyond an array or of unwritten memory give NaN."""
    check(name, target("tpu", pltpu.InterpretParams(uninitialized_memory="nan")), "float32")


def check_the_map(name, target, dtype):
    (x, dt, A, B, C, state), ids, cotangents, outputs, gradients = case(name)

    @numerics.jit
    def found(x, dt, A, B, C, state, cotangents):
        inputs = Inputs(x, dt, B[:, :, None], C[:, :, None], starts(ids))
        kernel = SelectiveScanKernel(target)
        run = kernel.prepare(inputs, A)
        kept, added = kernel.summary(run)
        return added, kept * state + added, kernel.state_gradient(run, *cotangents)

    none = np.zeros_like(state)
    loop = numerics.jit(functools.partial(naive.selective_scan, ids=ids))
    added = numerics.wide(numerics.run(loop, x, dt, A, B, C, none, dtype="float64")[1])
    expected = added, outputs[1], gradients[5]
    found = numerics.run(found, x, dt, A, B, C, state, cotangents, dtype=dtype)
    numerics.assert_close(found, expected, numerics.TOLERANCES[dtype])


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["blocks", "short", "many_numbers"])
def test_a_run_without_its_outputs(small_blocks, name, platform):
    """The map of a run, and the gradient of the state alone."""
    check_the_map(name, target(platform), "float64")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_time_steps_wider_than_what_is_written(small_blocks, platform):
    """As in models: each gradient has the dtype of its input."""
    inputs, ids, cotangents, outputs, gradients = case("packed")

    def kernel(x, dt, A, B, C, state):
        return run_kernel(ids, target(platform), x, dt.astype(jnp.float32), A.astype(jnp.float32), B, C, state)

    found = numerics.run(numerics.with_gradients(kernel), inputs, cotangents, dtype="bfloat16")
    numerics.assert_close(found, (outputs, gradients), numerics.TOLERANCES["bfloat16"])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_limits(small_blocks, platform):
    """Channels with time steps of 0, which keep the state, of 1e4, which forget it, and of 1; one document per token."""
    random = np.random.default_rng(0)
    dt = np.broadcast_to(np.array([0.0, 1e4, 1.0]), (1, 20, 3)).copy()
    x, (B, C) = numerics.normal(random, 1, 20, 3), numerics.normal(random, 2, 1, 20, 2)
    inputs = x, dt, -np.ones((3, 2)), B, C, numerics.normal(random, 1, 3, 2)
    for ids in (None, np.arange(20, dtype=np.int32)[None]):
        cotangents = numerics.normal(random, *x.shape), numerics.normal(random, 1, 3, 2)
        loop = numerics.with_gradients(functools.partial(naive.selective_scan, ids=ids))
        expected = numerics.run(loop, inputs, cotangents, dtype="float64")
        kernel = numerics.with_gradients(functools.partial(run_kernel, ids, target(platform)))
        numerics.assert_close(numerics.run(kernel, inputs, cotangents, dtype="float32"), expected, 1e-5)


def test_one_kernel_each_way():
    x, A, B = jnp.ones((1, 16, 2)), -jnp.ones((2, 3)), jnp.ones((1, 16, 3))
    operation = lambda *y: jnp.sum(selective_scan(*y, backend="pallas")[0] ** 2)  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(operation, (0, 1, 2, 3, 4)))(x, x, A, B, B))
    assert re.findall(r" name=(selective_\w+)", text) == ["selective_scan_forward_keep", "selective_scan_gradient"]
    of_state = jax.grad(lambda state: operation(x, x, None, B, B, state))
    text = str(jax.make_jaxpr(of_state)(jnp.zeros((1, 2, 3))))
    assert re.findall(r" name=(selective_\w+)", text) == [
        "selective_scan_forward_of_keys",
        "selective_scan_state_gradient_of_keys",
    ]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_family_of_the_kernel_in_pieces(small_blocks, platform):
    """Runs in sequence, and their gradients; that of the state is from the kernel that computes nothing else."""
    (x, dt, A, B, C, state), ids, cotangents, *_ = case("packed")
    marks = starts(ids)

    def pieces(family):
        def run(x, dt, A, B, C, state):
            return protocol.chunked(family, 50, Inputs(x, dt, B[:, :, None], C[:, :, None], marks), A, state)

        return numerics.run(numerics.with_gradients(run), (x, dt, A, B, C, state), cotangents, dtype="float64")

    by_kernel = pieces(SelectiveScanKernel(target=target(platform)))
    numerics.assert_close(by_kernel, numerics.wide(pieces(SelectiveScan(16))), 1e-12)


def test_auto_takes_it_where_it_runs(caplog):
    x, A, B, one = jnp.ones((1, 9, 2)), jnp.ones((2, 3)), jnp.ones((1, 9, 3)), jnp.ones((1, 1, 2))
    with jax.enable_x64(True):
        double = jnp.ones((1, 9, 2), jnp.float64)
    assert numerics.form(choose, "auto", x, x, A, B, B) == "chunked"
    log_once._logged.clear()
    for platform in backends.COMPILED:
        with backends.use_platform(platform, "some kind"), caplog.at_level(logging.INFO, logger="jaxlinear"):
            assert numerics.form(choose, "auto", x.astype(jnp.bfloat16), x, A, B, B) == "pallas"
            assert numerics.form(choose, "auto", one, one, None, B[:, :1], B[:, :1]) == "recurrent"
            assert numerics.form(choose, "auto", double, x, A, B, B) == "chunked"
            assert numerics.form(choose, "auto", x, x, A, B, B, chunk_size=4) == "chunked"
            with pytest.raises(
                UserError, match=r"the kernel takes float32 and bfloat16, not float64; use backend='chunked'"
            ):
                numerics.form(choose, "pallas", double, x, A, B, B)
            with pytest.raises(
                UserError, match=r"chooses its own blocks and takes no chunk_size=4; use backend='chunked'"
            ):
                numerics.form(choose, "pallas", x, x, A, B, B, chunk_size=4)
            wide = jnp.ones((1, 9, 300))
            with pytest.raises(UserError, match=r"the kernel takes N up to 128, not 300; use backend='chunked'"):
                numerics.form(choose, "pallas", x, x, None, wide, wide)
    assert sum("selective_scan runs as 'chunked', not as a kernel" in line for line in caplog.messages) == 2


def test_no_gradients_of_gradients():
    x, A, B = jnp.ones((1, 16, 2)), -jnp.ones((2, 3)), jnp.ones((1, 16, 3))
    first = jax.grad(lambda x: jnp.sum(selective_scan(x, x, A, B, B, backend="pallas")[0] ** 2))
    with pytest.raises(
        UserError, match=r"kernel \(backend='pallas'\) has no second derivatives; use backend='chunked'"
    ):
        jax.grad(lambda x: jnp.sum(first(x)))(x)
