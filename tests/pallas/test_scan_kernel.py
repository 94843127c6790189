"""The scan kernels for TPU and GPU, interpreted, against the loop over time: values, last states and all gradients."""

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
from jaxlinear.ops import backends, dtypes, linear_recurrence, protocol
from jaxlinear.ops.diagonal import family as diagonal_family
from jaxlinear.ops.diagonal import loops
from jaxlinear.ops.diagonal import op as diagonal
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.scan import blocks
from jaxlinear.pallas.scan import kernel as kernels
from tests import numerics, oracles

PLATFORMS = ["tpu", "gpu"]
# name: B, T, D, what else it has
CASES = {
    "one_token": (2, 1, 1, "packed"),
    "one_token_reverse": (1, 1, 100, "reverse complex constant"),
    "short": (2, 7, 100, "packed"),
    "short_reverse": (1, 7, 300, "reverse packed constant"),
    "whole_groups": (2, 64, 128, "reverse complex"),
    "packed": (1, 64, 1, "packed constant complex"),
    "plain": (2, 100, 150, ""),
    "plain_reverse": (1, 100, 128, "reverse packed"),
    "constant": (1, 100, 1, "constant"),
    "complex": (1, 100, 100, "complex packed"),
    "blocks": (2, 140, 128, "packed"),
    "blocks_reverse": (1, 257, 100, "reverse constant complex packed"),
    "whole_blocks_reverse": (1, 256, 1, "reverse packed"),
    "groups_reverse": (1, 144, 1, "reverse"),
}


def target(platform, interpret=True):
    return Target(platform, "none", interpret)


@functools.cache
def case(name):
    """Inputs, start marks, cotangents and, from the loop in float64, outputs and gradients."""
    batch, length, width, kinds = CASES[name]
    random, complex_ = np.random.default_rng(length + width), "complex" in kinds
    shape = (width,) if "constant" in kinds else (batch, length, width)
    a = numerics.uniform(random, *shape, low=-0.3)
    if complex_:
        a = numerics.representable(0.8 * a) + 1j * numerics.uniform(random, *shape, low=-0.5, high=0.5)
    x, state = (numerics.normal(random, *s, complex_=complex_) for s in ((batch, length, width), (batch, width)))
    starts = random.random((batch, length)) < 0.1 if "packed" in kinds else None
    cotangents = tuple(numerics.normal(random, *y.shape, complex_=complex_) for y in (x, state))
    loop = functools.partial(run_loop, starts, "reverse" in kinds)
    outputs, gradients = numerics.run(numerics.with_gradients(loop), (a, x, state), cotangents, dtype="float64")
    return (a, x, state), starts, cotangents, numerics.wide(outputs), numerics.wide(gradients)


def run_loop(starts, reverse, a, x, state):
    starts = None if starts is None else jnp.asarray(starts)
    return loops.run(a, x.astype(state.dtype), state, starts, reverse, "recurrent")


def run_kernel(starts, reverse, target, a, x, state):
    wide = dtypes.wide(state.dtype)
    starts = None if starts is None else jnp.asarray(starts)
    kernel = diagonal_family.DiagonalKernel(target, reverse)
    return kernel.through(kernel.prepare((a, x, starts), None), state.astype(wide))


def check(name, target, dtype):
    inputs, starts, cotangents, outputs, gradients = case(name)
    kernel = functools.partial(run_kernel, starts, "reverse" in CASES[name][3], target)
    found, found_gradients = numerics.run(numerics.with_gradients(kernel), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    if "complex" in CASES[name][3]:
        dtype = {"float64": "complex128"}.get(dtype, "complex64")
    assert [y.dtype for y in (found[0], *found_gradients)] == [dtype] * 4


@pytest.mark.slow(but_nth=3)  # TPU and GPU in turn
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(small_blocks, name, platform):
    check(name, target(platform), "float64")


@pytest.mark.slow(cases=["blocks-bfloat16-gpu", "plain_reverse-bfloat16-tpu"])
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name, dtype", [("blocks", "bfloat16"), ("plain_reverse", "bfloat16"), ("complex", "float32")])
def test_narrow_numbers(small_blocks, name, dtype, platform):
    check(name, target(platform), dtype)


@pytest.mark.parametrize("name", ["blocks", "plain", "packed"])
def test_on_a_simulated_tpu(name):
    """With TPU memories and copies, and blocks of several registers side by side; reads beyond an array or of unwritten
    memory give NaN."""
    check(name, target("tpu", pltpu.InterpretParams(uninitialized_memory="nan")), "float32")


@pytest.mark.parametrize("reverse", [False, True])
def test_infinities_do_not_cross_documents(reverse):
    """On GPU, in either direction: 0 times the last state of the document before would not be a number."""
    starts = np.arange(9)[None] == 4
    first, second = (slice(5, 9), slice(0, 5)) if reverse else (slice(0, 4), slice(4, 9))  # as the scan goes
    a, x = np.full((1, 9, 3), 0.5, np.float32), np.ones((1, 9, 3), np.float32)
    well, ill = np.ones((1, 3), np.float32), np.full((1, 3), np.inf, np.float32)

    @numerics.jit
    def run(state, d_h, d_final):
        scan = functools.partial(run_kernel, starts, reverse, target("gpu"), a)
        outputs, pullback = jax.vjp(scan, x, state)
        return outputs, pullback((d_h, d_final))

    (h, final), (d_x, d_state) = run(well, x, well)
    (ill_h, ill_final), _ = run(ill, x, well)
    _, (ill_d_x, ill_d_state) = run(well, x, ill)
    assert np.isinf(ill_h[:, first]).all() and np.isinf(ill_d_x[:, second]).all()
    assert np.array_equal(ill_h[:, second], h[:, second]) and np.array_equal(ill_final, final)
    assert np.array_equal(ill_d_x[:, first], d_x[:, first]) and np.array_equal(ill_d_state, d_state)
    assert np.isfinite(h).all() and np.isfinite(d_x).all()


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["short", "complex", "blocks", "packed"])
def test_a_run_without_its_outputs(small_blocks, name, platform):
    """The map of a run, and the gradient of the state alone."""
    (a, x, state), starts, cotangents, outputs, gradients = case(name)
    every_a = np.broadcast_to(a, x.shape)
    if starts is not None:
        every_a = np.where(starts[..., None], 0, every_a)

    @numerics.jit
    def both(a, x, state, d_h, d_final):
        marks = None if starts is None else jnp.asarray(starts)
        return (
            kernels.summary(a, x, state, marks, target=target(platform)),
            kernels.state_gradient(a, d_h, d_final, marks, reverse=False, target=target(platform)),
        )

    found = numerics.run(both, a, x, state, *cotangents, dtype="float64")
    numerics.assert_close(found, ((np.prod(every_a, axis=1), outputs[1]), gradients[2]), 1e-10)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_limits(small_blocks, platform, reverse):
    """a = 0 forgets, a = 1 sums (whole numbers, so that float32 is exact), and a = exp(-50) nearly forgets."""
    random = np.random.default_rng(0)
    a = np.broadcast_to(np.array([0.0, 1.0, np.exp(-50.0)]), (1, 50, 3))
    x, d_h = (random.integers(-9, 9, a.shape).astype(float) for _ in range(2))
    state, d_final = np.full((1, 3), 5.0), np.full((1, 3), -2.0)
    outputs = oracles.linear_recurrence(a, x, state, reverse=reverse)
    kernel = functools.partial(run_kernel, None, reverse, target(platform))
    found, (d_a, d_x, d_state) = numerics.run(
        numerics.with_gradients(kernel), (a, x, state), (d_h, d_final), dtype="float32"
    )
    exact = jax.tree.map(lambda y: y[..., :2], (found, outputs))
    numerics.assert_close(*exact, 0)
    numerics.assert_close(found, outputs, 1e-6)
    # The gradient of x is the same recurrence over d_h in the other direction, with d_final in its first step.
    d_h[:, 0 if reverse else -1] += d_final
    expected, last = oracles.linear_recurrence(a, d_h, reverse=not reverse)
    numerics.assert_close((d_x, d_state), (expected, a[:, 0] * last), 1e-6)
    before = np.concatenate(
        [outputs[0][:, 1:], state[:, None]] if reverse else [state[:, None], outputs[0][:, :-1]], axis=1
    )
    numerics.assert_close(d_a, expected * before, 1e-6)


def test_the_operation_takes_it(small_blocks):
    """Trailing axes, a real x with a complex a, an a with fewer axes, segment ids, and no initial state."""
    random = np.random.default_rng(1)
    a, x = numerics.uniform(random, 3, high=0.9) * np.exp(1j), numerics.normal(random, 2, 20, 2, 3)
    ids = np.array([[0] * 7 + [1] * 13, [3] * 20], np.int32)
    cotangents = tuple(numerics.normal(random, *s, complex_=True) for s in ((2, 20, 2, 3), (2, 2, 3)))
    results = []
    for backend in ("recurrent", "pallas"):
        operation = functools.partial(linear_recurrence, segment_ids=ids, backend=backend)
        results.append(numerics.run(numerics.with_gradients(operation), (a, x), cotangents, dtype="float64"))
    numerics.assert_close(results[1], numerics.wide(results[0]), 1e-10)
    assert [y.dtype for y in results[1][0]] == [y.dtype for y in results[0][0]]


def test_one_kernel_each_way():
    x = jnp.ones((1, 6, 2))
    operation = lambda a, x: jnp.sum(linear_recurrence(a, 2 * x, backend="pallas")[0] ** 2)  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(operation, (0, 1)))(0.5 * x, x))
    assert re.findall(r" name=(scan_\w+)", text) == ["scan_forward", "scan_gradient_reverse"]
    # For the state's gradient alone, nothing as long as the sequence is kept or written.
    of_state = jax.grad(lambda state: jnp.sum(linear_recurrence(x, x, state, backend="pallas")[0]))
    assert "scan_state_gradient_reverse" in str(jax.make_jaxpr(of_state)(x[:, 0]))


def test_the_family_of_the_kernel_in_pieces(small_blocks):
    """Runs in sequence, and their gradients; that of the state is from the kernel that computes nothing else."""
    random = np.random.default_rng(2)
    a, x, state = random.uniform(0, 1, (2, 12, 3)), random.standard_normal((2, 12, 3)), random.standard_normal((2, 3))
    starts = np.zeros((2, 12), bool)
    starts[0, 5] = starts[1, 4] = True
    cotangents = random.standard_normal(x.shape), random.standard_normal(state.shape)

    def pieces(family):
        def run(a, x, state):
            return protocol.chunked(family, 4, (a, x, jnp.asarray(starts)), None, state)

        return numerics.run(numerics.with_gradients(run), (a, x, state), cotangents, dtype="float64")

    by_kernel = pieces(diagonal_family.DiagonalKernel(target=target("tpu")))
    numerics.assert_close(by_kernel, numerics.wide(pieces(diagonal.Diagonal("recurrent"))), 1e-12)


def test_auto_takes_it_where_it_runs(caplog):
    x, one = jnp.ones((1, 5, 2)), jnp.ones((1, 1, 2))
    with jax.enable_x64(True):
        double = jnp.ones((1, 5, 2), jnp.float64)
    assert numerics.form(diagonal.choose, "auto", x, x) == "recurrent"
    log_once._logged.clear()
    for platform in backends.COMPILED:
        with backends.use_platform(platform, "some kind"), caplog.at_level(logging.INFO, logger="jaxlinear"):
            assert numerics.form(diagonal.choose, "auto", x, x.astype(jnp.bfloat16)) == "pallas"
            assert numerics.form(diagonal.choose, "auto", one, one) == "recurrent"
            assert numerics.form(diagonal.choose, "auto", double, double) == "associative"
            assert backends.target() == Target(platform, "some kind", False)
    said = "linear_recurrence runs as 'associative', not as a kernel: the kernel computes in float32 or complex64"
    assert [record.getMessage() for record in caplog.records] == [f"{said}, not in float64"]


@pytest.mark.parametrize(
    "dtype, reason",
    [("float64", "computes in float32 or complex64, not in float64"), ("float16", "takes .* not float16")],
)
def test_what_it_does_not_take_is_refused(dtype, reason):
    with jax.enable_x64(True), backends.use_platform("tpu", "TPU v5 lite"):
        x = jnp.ones((1, 5, 2), dtype)
        with pytest.raises(UserError, match=f"linear_recurrence: the kernel {reason}; use backend='associative'"):
            linear_recurrence(x, x, backend="pallas")


def test_the_map_of_a_run_has_no_gradient():
    x = jnp.ones((1, 5, 2))
    family = diagonal_family.DiagonalKernel(target=target("tpu"))
    with pytest.raises(UserError, match="the kernel has no gradient for the map of a run"):
        jax.grad(lambda a: jnp.sum(family.summarise(family.prepare((a, x, None), None))[1]))(x)


@pytest.mark.parametrize("width", [1, 100, 128, 300, 640, 2560, 8192])
@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "another"])
def test_blocks(kind, width):
    """They take at most 12 MiB of VMEM, counting a backward pass's arrays twice, and waste at most a tile each."""
    for parts in (1, 2):
        block = blocks.tpu(kind, 100_000, width, parts)
        assert block.time % 128 == block.rows % 16 == block.time % block.rows == 0
        assert block.width == width or block.width % 128 == 0
        count = -(-width // block.width)
        assert (count - 1) * block.width < width
        assert count * block.width - width < 128 * count
        assert 2 * 5 * parts * block.time * block.width * 4 <= 12 * 2**20
