"""What the kernels of the short convolution, of the gated RMSNorm and of the RG-LRU alone promise: digits of small results,
gates and decays at the limits, and documents that infinities do not leave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import bands, blocks
from jaxlinear.pallas.rg_lru import equations as rg_lru_equations
from jaxlinear.pallas.rg_lru import gpu as rg_lru_gpu
from jaxlinear.pallas.rg_lru import tpu as rg_lru_tpu
from jaxlinear.parallel import operations, sharding
from tests import naive, numerics
from tests.ops import test_rg_lru_gates, test_rg_lru_recurrence
from tests.pallas import kernel_cases
from tests.shards import make_mesh

each_platform = pytest.mark.parametrize("target", kernel_cases.PLATFORMS)


@pytest.mark.parametrize(
    "operation, name",
    [
        *(("short_convolution", name) for name in ("narrow", "heads_between_registers", "sums", "sums_in_heads")),
        *(("gated_rms_norm", name) for name in ("blocks_of_time", "heads", "narrow", "sigmoid")),
    ],
)
def test_without_the_kernel(operation, name):
    kernel_cases.check(operation, name, "float64", backend="separate")


# The short convolution


@each_platform
def test_small_results_keep_their_digits(target, use):
    """Of very negative sums, whose sigmoid is close to 0; and of the largest."""
    use(target)
    z = np.concatenate([np.linspace(-80, 20, 401), [-1e30, 1e30]]).astype(np.float32)
    y, _ = ops.short_convolution(z[None, :, None], np.array([[0.0], [1.0]], np.float32), backend="pallas")
    expected = z.astype(np.float64) / (1 + np.exp(-np.maximum(z.astype(np.float64), -700)))
    np.testing.assert_allclose(np.asarray(y)[0, :, 0], expected, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("options", [{"head_width": 2}, {"activation": "none"}], ids=["heads", "sums"])
@each_platform
def test_another_document_cannot_be_seen(small_blocks, target, options, use):
    """Not even infinities and NaN get across, in either direction."""
    use(target)
    random = np.random.default_rng(0)
    x, kernel = numerics.normal(random, 1, 200, 4), numerics.normal(random, 4, 4)
    ids = np.repeat([[0, 1, 0]], [63, 66, 71], axis=1).astype(np.int32)
    ill = np.where(ids[..., None] == 1, np.array([np.inf, np.nan, -np.inf, 1e38]), x)

    @numerics.jit
    def run(x):
        op = functools.partial(ops.short_convolution, kernel=kernel, segment_ids=ids, backend="pallas", **options)
        y, pullback = jax.vjp(lambda x: op(x)[0], x.astype(jnp.float32))
        return y, *pullback(jnp.ones_like(y))

    well = ids[0] == 0
    for got, want in zip(run(ill), run(x), strict=True):
        assert np.all(np.isfinite(want)) and np.array_equal(np.asarray(got)[:, well], np.asarray(want)[:, well])


# The gated RMSNorm


@each_platform
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_a_closed_gate_and_an_open_one(small_blocks, target, norm_before_gate, activation, use):
    """Gates so negative that the sigmoid is 0, and so large that it is 1; and a token of zeros, whose norm is epsilon's."""
    use(target)
    x, gate = np.random.default_rng(0).standard_normal((1, 4, 128)), np.array([-200.0, -80.0, 1e4, 1.0])[None, :, None]
    x[:, 3] = 0
    arguments = x, gate + 0 * x, np.ones(128)
    options = {"epsilon": 1e-6, "norm_before_gate": norm_before_gate, "activation": activation}
    kernels = [kernel_cases.kernel("gated_rms_norm", **options, backend=how) for how in ("pallas", "separate")]
    both = [numerics.run(kernel, arguments, x * 0 + 1, dtype="float32") for kernel in kernels]
    assert all(np.all(np.isfinite(y)) for y in jax.tree.leaves(both))
    numerics.assert_close(both[0], numerics.wide(both[1]), 1e-5)


# The RG-LRU


@pytest.mark.parametrize("name", ["whole_blocks_without_documents", "odd"])
def test_programs_that_occupy_a_gpu(small_blocks, name, use, monkeypatch):
    """They go through all of time, without what else they need for its parts."""
    monkeypatch.setattr(blocks, "GPU_PROGRAMS", 1)
    monkeypatch.setattr(blocks, "GPU_ROWS", (4, 2 if name == "odd" else 8))
    monkeypatch.setattr(rg_lru_gpu.scan, "forward", None)
    use("gpu")
    kernel_cases.check("rg_lru", name, "float64")


def test_one_minus_the_square_to_the_last_digits():
    """In float32, at every a from 0 to 1 - 1e-9, on both sides of where the series ends."""
    at_the_end = rg_lru_equations._NEAR * (1 + np.linspace(-1e-3, 1e-3, 99))
    log2_a = -np.concatenate([[0.0], np.geomspace(1e-9, 100, 20_000), at_the_end]).astype(np.float32)
    found = rg_lru_equations.one_minus_square(jnp.asarray(log2_a), jnp.exp2(jnp.asarray(log2_a)))
    expected = -np.expm1(2 * np.log(2) * log2_a.astype(np.float64))
    assert found[0] == 0
    assert np.max(np.abs(found[1:] / expected[1:] - 1)) < 2e-6


@pytest.mark.parametrize(
    "operation, target, plain", [("rg_lru", "gpu", "separate"), ("rg_lru_gates", "tpu", "products")]
)
@pytest.mark.parametrize("bias", [-200.0, -18.0, 200.0])
def test_at_every_decay(small_blocks, operation, target, plain, bias, use):
    use(target)
    check_decay(operation, plain, bias)


def check_decay(operation, plain, bias):
    """At -200 a is 1, and at 200 at its smallest; neither depends on the gate. At -18 a is close to 1."""
    (x, kernel, _, *others), first, ids = test_rg_lru_recurrence.draw(1, 20, 2, 8)
    inputs, options = (x, kernel, np.full(16, bias), *others), {"first": first, "segment_ids": ids}
    cotangents = np.ones(x.shape), np.ones(others[-1].shape)
    if operation == "rg_lru_gates":
        inputs, options, cotangents = inputs[:-1], {"first": first}, (cotangents[0],) * 2
    found, expected = (
        numerics.run(kernel_cases.kernel(operation, **options, backend=name), inputs, cotangents, dtype="float32")
        for name in ("pallas", plain)
    )
    for y, want in zip(jax.tree.leaves(found), jax.tree.leaves(numerics.wide(expected)), strict=True):
        assert np.max(np.abs(y - want)) <= 1e-5 * max(0.1, np.max(np.abs(want)))


def test_an_infinite_state_cannot_be_seen(small_blocks, use):
    """On GPU not even an infinity in the state gets across to another document, in either direction."""
    use("gpu")
    (x, *of_gates, state), *_ = test_rg_lru_recurrence.draw(1, 70, 1, 4)
    ids, first = (np.arange(70)[None] >= 40).astype(np.int32), np.arange(70)[None] == 40
    of_gates, state = numerics.cast((of_gates, state), "float32")

    def op(x, state):
        return ops.rg_lru(x, *of_gates, jnp.asarray(first), state, segment_ids=ids, backend="pallas")[0]

    run, d_h = numerics.with_gradients(op), np.ones((1, 70, 4), np.float32)
    x = np.float32(x)
    h, (d_x, d_state) = run((x, state), d_h)
    _, (ill_d_x, ill_d_state) = run((x, state), np.where(ids[..., None], np.float32(np.inf), d_h))
    ill_h, _ = run((x, np.full_like(state, np.inf)), d_h)
    assert not np.isfinite(ill_h[0, 39]).any() and not np.isfinite(ill_d_x[0, 40]).any()
    assert np.array_equal(ill_h[0, 40:], h[0, 40:]) and np.isfinite(h[0, 40:]).all()
    assert np.array_equal(ill_d_x[0, :40], d_x[0, :40]) and np.array_equal(ill_d_state, d_state)


@pytest.mark.parametrize(
    "kind, count, channels, dtype, length, chosen",
    [
        ("TPU v5 lite", 16, 160, "bfloat16", 4096, (1280, 512)),
        ("TPU v5 lite", 16, 160, "float32", 4096, (640, 512)),
        ("TPU v5 lite", 32, 176, "bfloat16", 4096, (1408, 512)),
        ("TPU v5 lite", 32, 176, "float32", 4096, (1408, 256)),
        ("TPU v5 lite", 16, 256, "bfloat16", 4096, (1024, 512)),
        ("TPU v5 lite", 16, 256, "bfloat16", 300, (1024, 128)),
        ("TPU v5 lite", 8, 160, "bfloat16", 4096, (1280, 512)),
        ("TPU v5", 8, 160, "bfloat16", 4096, (640, 512)),
        ("TPU v5", 4, 176, "bfloat16", 4096, (704, 512)),
    ],
)
def test_channels_of_a_block(kind, count, channels, dtype, length, chosen, monkeypatch):
    """VMEM has room for them and for the most tokens, and there is a block for each core."""
    monkeypatch.setattr(blocks, "TIME", (512, 256, 128))
    monkeypatch.setattr(blocks, "CHANNELS", 1024)
    x = jax.ShapeDtypeStruct((1, length, count * channels), dtype)
    kernel = jax.ShapeDtypeStruct((2, count, channels, channels), jnp.float32)
    shape = bands.shape_of(x, kernel, rg_lru_tpu._needed(x.dtype.itemsize), Target("tpu", kind))
    assert (shape.group, shape.time) == chosen


def test_over_time_gates_and_recurrence_are_separate():
    inputs, first, ids = test_rg_lru_recurrence.draw(2, 32, 4, 3)
    *of_gates, state = numerics.cast(inputs, "float32")
    with sharding.use_mesh(make_mesh({"data": 2, "sequence": 4})):
        run = numerics.jit(functools.partial(operations.rg_lru, segment_ids=ids))
        found = run(*of_gates, jnp.asarray(first), state)
        with pytest.raises(UserError, match=r"needs whole rows, and mesh.sequence shards them; use backend='separate'"):
            operations.rg_lru(*of_gates, jnp.asarray(first), state, backend="pallas")
    expected = numerics.run(test_rg_lru_recurrence.reference(first, ids), *inputs, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), 1e-5)


def test_blocks_that_devices_cannot_have_whole():
    inputs, first = test_rg_lru_gates.draw(4, 16, 3, 8)
    arguments = *numerics.cast(inputs, "float32"), jnp.asarray(first)
    with sharding.use_mesh(make_mesh({"data": 4, "tensor": 2})):
        with pytest.raises(UserError, match="needs whole blocks on each device, and 12 channels are no multiple of 8"):
            operations.rg_lru_gates(*arguments, backend="pallas")
        found = numerics.jit(operations.rg_lru_gates)(*arguments)
    expected = numerics.run(naive.rg_lru_gates, *inputs, first, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), 1e-5)
