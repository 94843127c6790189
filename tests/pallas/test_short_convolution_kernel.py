"""The kernels of the short convolution, interpreted, and the operation without them, against the step-by-step oracle:
values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlinear import log_once, ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.short_convolution import blocks
from jaxlinear.parallel import operations, sharding
from tests import naive, numerics
from tests.shards import make_mesh

# name: B, T, D, width, heads, segments and, unless it is SiLU, activation
CASES = {
    "one_token": (2, 1, 3, 4, None, True),
    "narrow": (1, 130, 3, 4, None, True),  # two blocks of time, the second nearly empty
    "groups": (2, 300, 256, 3, None, True),  # two blocks of channels, three of time
    "most_taps": (1, 140, 5, 9, None, False),
    "two_taps": (1, 70, 5, 2, 1, True),
    "heads_of_registers": (1, 200, 512, 4, 2, True),
    "heads_share_a_register": (1, 140, 128, 4, 4, True),
    "heads_between_registers": (2, 135, 300, 4, 3, True),
    "wide_heads": (1, 70, 400, 4, 2, True),
    "sums": (2, 300, 256, 4, None, True, "none"),
    "sums_in_heads": (2, 135, 300, 4, 3, True, "none"),
}
TPU, GPU = (Target(platform, "none", True) for platform in ("tpu", "gpu"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "TPU_TIME", (128,))
    monkeypatch.setattr(blocks, "TPU_CHANNELS", 256)
    monkeypatch.setattr(blocks, "GPU_TIME", 32)


@functools.cache
def case(name):
    batch, length, channels, width, heads, packed, activation = (*CASES[name], "silu")[:7]
    random = np.random.default_rng(length)
    shapes = ((batch, length, channels), (width, channels), (channels,), (batch, width - 1, channels))
    inputs = tuple(numerics.normal(random, *shape) for shape in shapes)
    ids = np.cumsum(random.random((batch, length)) < 0.2, axis=1, dtype=np.int32) % 2 if packed else None
    options = {"head_width": heads and channels // heads, "activation": activation}
    reference = numerics.with_gradients(functools.partial(naive.short_convolution, **options, ids=ids))
    cotangents = numerics.normal(random, *shapes[0]), numerics.normal(random, *shapes[3])
    outputs, gradients = numerics.run(reference, inputs, cotangents, dtype="float64")
    return inputs, options | {"segment_ids": ids}, cotangents, numerics.wide(outputs), numerics.wide(gradients)


@pytest.fixture
def use(monkeypatch):
    return lambda target: monkeypatch.setattr(backends, "target", lambda: target)


def check(name, dtype, tolerance, backend="pallas"):
    inputs, options, cotangents, outputs, gradients = case(name)
    op = functools.partial(ops.short_convolution, **options, backend=backend)
    found, found_gradients = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype=dtype)
    assert {y.dtype.name for y in (*found, *found_gradients)} == {dtype}
    numerics.assert_close(found, outputs, tolerance)
    numerics.assert_close(found_gradients, gradients, tolerance)


@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, target, use):
    use(target)
    check(name, "float64", 1e-12)


@pytest.mark.parametrize("name", ["narrow", "heads_between_registers", "sums", "sums_in_heads"])
def test_without_the_kernel(name):
    check(name, "float64", 1e-12, backend="separate")


@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("name", ["groups", "heads_between_registers", "sums"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_numbers(name, dtype, target, use):
    use(target)
    check(name, dtype, numerics.TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["groups", "heads_between_registers", "sums"])
def test_on_a_simulated_tpu(use, name):
    """With TPU memories and copies; reads beyond an array or of unwritten memory give NaN."""
    use(Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan")))
    check(name, "float32", 1e-5)


@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
def test_small_results_keep_their_digits(target, use):
    """Of very negative sums, whose sigmoid is close to 0; and of the largest."""
    use(target)
    z = np.concatenate([np.linspace(-80, 20, 401), [-1e30, 1e30]]).astype(np.float32)
    y, _ = ops.short_convolution(z[None, :, None], np.array([[0.0], [1.0]], np.float32), backend="pallas")
    expected = z.astype(np.float64) / (1 + np.exp(-np.maximum(z.astype(np.float64), -700)))
    np.testing.assert_allclose(np.asarray(y)[0, :, 0], expected, rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("options", [{"head_width": 2}, {"activation": "none"}], ids=["heads", "sums"])
@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
def test_another_document_cannot_be_seen(target, options, use):
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


@pytest.mark.parametrize(
    "heads, activation", [(None, "silu"), (4, "silu"), (None, "none")], ids=["alone", "heads", "sums"]
)
@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_on_a_mesh(sizes, heads, activation):
    random = np.random.default_rng(0)
    inputs = tuple(numerics.normal(random, *shape) for shape in ((4, 40, 12), (4, 12), (12,), (4, 3, 12)))
    ids = np.cumsum(random.random((4, 40)) < 0.1, axis=1, dtype=np.int32)
    cotangents = numerics.normal(random, 4, 40, 12), numerics.normal(random, 4, 3, 12)
    options = {"segment_ids": ids, "head_width": heads and 12 // heads, "activation": activation}
    reference = functools.partial(ops.short_convolution, **options, backend="separate")
    op = functools.partial(operations.short_convolution, **options, channels="heads", backend="pallas")
    expected = numerics.run(numerics.with_gradients(reference), inputs, cotangents, dtype="float64")
    with sharding.use_mesh(make_mesh(sizes)):
        found = numerics.run(numerics.with_gradients(op), inputs, cotangents, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), 1e-12)


@pytest.mark.parametrize(
    "shape, width, heads, reason",
    [
        ((1, 9, 4), 1, None, r"takes 2 to 9 taps, not 1"),
        ((1, 9, 4), 10, None, r"takes 2 to 9 taps, not 10"),
        ((1, 9, 9000), 4, None, r"no room in VMEM for 9000 channels, which no multiple of 128 and of a head divides"),
        ((1, 9, 0), 4, None, r"takes no empty arrays"),
        ((1, 9, 4), 4, 3, r"heads of 3 channels do not divide 4 channels"),
    ],
)
def test_refused(shape, width, heads, reason):
    with pytest.raises(UserError, match=reason):
        ops.short_convolution(jnp.ones(shape), jnp.ones((width, shape[2])), head_width=heads, backend="pallas")


def test_an_unknown_activation():
    with pytest.raises(UserError, match=r"activation='relu' must be one of silu, none"):
        ops.short_convolution(jnp.ones((1, 9, 4)), jnp.ones((4, 4)), activation="relu")


@pytest.mark.parametrize(
    "channels, heads, dtype, reason",
    [
        (514, 2, "float32", r"takes heads of up to 256 channels, not 257; use backend='separate'"),
        (8, 2, "float16", r"takes float32 and bfloat16, not float16"),
    ],
)
def test_refused_on_gpu(channels, heads, dtype, reason):
    arguments = jnp.ones((1, 9, channels), dtype), jnp.ones((4, channels))
    with backends.use_platform("gpu", "NVIDIA H100 80GB HBM3"), pytest.raises(UserError, match=reason):
        ops.short_convolution(*arguments, head_width=channels // heads, backend="pallas")


def test_refused_where_time_is_sharded(caplog, monkeypatch):
    monkeypatch.setattr(log_once, "_logged", set())
    x, kernel = jnp.ones((4, 32, 8)), jnp.ones((4, 8))
    with sharding.use_mesh(make_mesh({"data": 4, "sequence": 2})):
        with pytest.raises(UserError, match=r"needs whole rows, and mesh.sequence shards them"):
            operations.short_convolution(x, kernel, backend="pallas")
        with backends.use_platform("tpu"), caplog.at_level("INFO", logger="jaxlinear"):
            jax.eval_shape(operations.short_convolution, x, kernel)
    assert caplog.messages == [
        "short_convolution runs as 'separate', not as a kernel: the kernel needs whole rows, and mesh.sequence shards them"
    ]


def test_second_derivatives_are_refused():
    kernel = jnp.ones((4, 2))
    objective = lambda x: jnp.sum(ops.short_convolution(x, kernel, backend="pallas")[0])  # noqa: E731
    with pytest.raises(UserError, match=r"no second derivatives; use backend='separate'"):
        jax.grad(lambda x: jnp.sum(jax.grad(objective)(x)))(jnp.ones((1, 4, 2)))
