"""The kernels of the RMSNorm with its gate, interpreted, and the operation without them, against the equation: values and
all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlinear import log_once, ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.pallas.gated_rms_norm import blocks
from jaxlinear.pallas.parts.target import Target
from jaxlinear.parallel import operations, sharding
from tests import naive, numerics
from tests.shards import make_mesh

# name: B, T, D, heads, whether there is a skip, whether the norm comes first, and the activation unless it is SiLU
CASES = {
    "one_token": (3, 1, 128, 1, True, False),
    "blocks_of_time": (2, 150, 256, 1, True, False),  # the last in part
    "no_skip": (1, 40, 384, 1, False, False),
    "heads": (2, 70, 512, 4, False, True),
    "wide_heads": (1, 33, 1536, 2, True, True),
    "gate_first_by_head": (1, 64, 512, 2, False, False),
    "sigmoid": (1, 40, 256, 2, False, True, "sigmoid"),
    "sigmoid_first": (2, 40, 256, 1, True, False, "sigmoid"),
}
# Heads that are no registers, and pieces of a head that are only partly its own.
ON_GPU = CASES | {
    "narrow": (2, 19, 6, 2, True, True),
    "odd": (1, 50, 1500, 3, True, False),
    "pieces": (1, 9, 1400, 1, True, False),
}
TPU, GPU = (Target(platform, "none", True) for platform in ("tpu", "gpu"))
EACH = [*((TPU, name) for name in CASES), *((GPU, name) for name in ON_GPU)]
IDS = [f"{target.platform}-{name}" for target, name in EACH]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "TPU_TIME", (64, 32))
    monkeypatch.setattr(blocks, "TPU_NUMBERS", 64 * 1024)


@functools.cache
def case(name):
    batch, length, channels, heads, skips, before, *activation = ON_GPU[name]
    random = np.random.default_rng(length)
    shape = batch, length, channels
    inputs = *(numerics.normal(random, *shape) for _ in range(2)), numerics.normal(random, channels // heads)
    if skips:
        inputs += numerics.normal(random, *shape), numerics.normal(random, channels)
    options = {"epsilon": 1e-2, "norm_before_gate": before}
    options |= {"activation": activation[0]} if activation else {}
    cotangent = numerics.normal(random, *shape)
    reference = numerics.with_gradients(functools.partial(naive.gated_rms_norm, **options))
    return inputs, options, cotangent, numerics.wide(numerics.run(reference, inputs, cotangent, dtype="float64"))


@pytest.fixture
def use(monkeypatch):
    return lambda target: monkeypatch.setattr(backends, "target", lambda: target)


def check(name, dtype, tolerance, backend="pallas"):
    inputs, options, cotangent, expected = case(name)
    op = functools.partial(ops.gated_rms_norm, **options, backend=backend)
    found = numerics.run(numerics.with_gradients(op), inputs, cotangent, dtype=dtype)
    assert {y.dtype.name for y in jax.tree.leaves(found)} == {dtype}
    numerics.assert_close(found, expected, tolerance)


@pytest.mark.parametrize("target, name", EACH, ids=IDS)
def test_values_and_gradients(name, target, use):
    use(target)
    check(name, "float64", 1e-12)


@pytest.mark.parametrize("name", ["blocks_of_time", "heads", "narrow", "sigmoid"])
def test_without_the_kernel(name):
    check(name, "float64", 1e-12, backend="separate")


@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("name", ["blocks_of_time", "heads", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_numbers(name, dtype, target, use):
    use(target)
    check(name, dtype, numerics.TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["blocks_of_time", "heads"])
def test_on_a_simulated_tpu(use, name):
    """With TPU memories and copies; reads beyond an array or of unwritten memory give NaN."""
    use(Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan")))
    check(name, "float32", 1e-5)


@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_a_closed_gate_and_an_open_one(target, norm_before_gate, activation, use):
    """Gates so negative that the sigmoid is 0, and so large that it is 1; and a token of zeros, whose norm is epsilon's."""
    use(target)
    random = np.random.default_rng(0)
    x, gate = random.standard_normal((1, 4, 128)), np.repeat([[-200.0, -80.0, 1e4, 1.0]], 128, axis=0).T[None]
    x[:, 3] = 0
    arguments = tuple(y.astype(np.float32) for y in (x, gate, np.ones(128)))
    op = functools.partial(ops.gated_rms_norm, epsilon=1e-6, norm_before_gate=norm_before_gate, activation=activation)
    both = [
        numerics.run(numerics.with_gradients(functools.partial(op, backend=how)), arguments, x * 0 + 1, dtype="float32")
        for how in ("pallas", "separate")
    ]
    assert all(np.all(np.isfinite(y)) for y in jax.tree.leaves(both))
    numerics.assert_close(both[0], numerics.wide(both[1]), 1e-5)


@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize(
    "sizes, heads",
    [({"data": 2, "sequence": 4}, 1), ({"data": 2, "tensor": 4}, 4), ({"fsdp": 4, "tensor": 2}, 4)],
    ids=str,
)
def test_on_a_mesh(sizes, heads, target, use):
    use(target)
    random = np.random.default_rng(0)
    shape = 4, 40, 512
    inputs = *(numerics.normal(random, *shape) for _ in range(2)), numerics.normal(random, 512 // heads)
    inputs += numerics.normal(random, *shape), numerics.normal(random, 512)
    cotangent = numerics.normal(random, *shape)
    options = {"epsilon": 1e-6, "norm_before_gate": heads > 1}
    reference = functools.partial(naive.gated_rms_norm, **options)
    expected = numerics.run(numerics.with_gradients(reference), inputs, cotangent, dtype="float64")
    op = functools.partial(operations.gated_rms_norm, **options, channels="heads", backend="pallas")
    with sharding.use_mesh(make_mesh(sizes)):
        found = numerics.run(numerics.with_gradients(op), inputs, cotangent, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), 1e-12)


@pytest.mark.parametrize(
    "platform, channels, heads, dtype, reason",
    [
        (
            "tpu",
            400,
            1,
            "float32",
            r"takes heads of whole registers of 128 channels, not of 400; use backend='separate'",
        ),
        ("tpu", 2**15, 1, "float32", r"has no room in VMEM for 32768 channels; use backend='separate'"),
        ("tpu", 128, 1, "float16", r"takes float32 and bfloat16, not float16"),
        ("gpu", 2**15, 1, "float32", r"takes heads of up to 5120 channels, not 32768; use backend='separate'"),
        ("gpu", 2**16, 2**16, "float32", r"takes up to 65535 heads, not 65536"),
    ],
)
def test_refused(platform, channels, heads, dtype, reason, monkeypatch):
    monkeypatch.undo()  # blocks as they are
    x = jax.ShapeDtypeStruct((1, 9, channels), dtype)
    op = functools.partial(ops.gated_rms_norm, epsilon=1e-6, backend="pallas")
    with backends.use_platform(platform, "NVIDIA H100 80GB HBM3"), pytest.raises(UserError, match=reason):
        jax.eval_shape(op, x, x, jax.ShapeDtypeStruct((channels // heads,), "float32"))


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"gate": (1, 9, 4)}, r"gate is \(1, 9, 4\), not \(1, 9, 8\)"),
        ({"skipped": (1, 9, 8)}, r"takes skipped and skip together, or neither"),
        ({"skipped": (1, 9, 8), "skip": (4,)}, r"skip is \(4,\), not \(8,\)"),
        ({"x": (9, 8)}, r"x"),
    ],
)
def test_wrong_shapes(changed, reason):
    shapes = {"x": (1, 9, 8), "gate": (1, 9, 8), "scale": (4,)} | changed
    with pytest.raises(UserError, match=reason):
        ops.gated_rms_norm(**{name: jnp.ones(shape) for name, shape in shapes.items()}, epsilon=1e-6)


def test_an_unknown_activation():
    with pytest.raises(UserError, match=r"activation='gelu' must be one of silu, sigmoid"):
        ops.gated_rms_norm(jnp.ones((1, 9, 8)), jnp.ones((1, 9, 8)), jnp.ones(8), activation="gelu", epsilon=1e-6)


def test_heads_that_do_not_divide():
    with pytest.raises(UserError, match=r"gated_rms_norm: heads of 3 channels do not divide 8 channels"):
        ops.gated_rms_norm(jnp.ones((1, 9, 8)), jnp.ones((1, 9, 8)), jnp.ones(3), epsilon=1e-6)


def test_where_devices_have_parts_of_a_head(caplog, monkeypatch):
    monkeypatch.setattr(log_once, "_logged", set())
    x, scale = jnp.ones((4, 32, 256)), jnp.ones(256)
    with sharding.use_mesh(make_mesh({"data": 4, "tensor": 2})):
        run = functools.partial(operations.gated_rms_norm, channels="heads", epsilon=1e-6)
        with pytest.raises(UserError, match=r"needs whole heads, and a device has 128 channels, of heads of 256"):
            run(x, x, scale, backend="pallas")
        with backends.use_platform("tpu"), caplog.at_level("INFO", logger="jaxlinear"):
            jax.eval_shape(run, x, x, scale)
    assert caplog.messages == [
        "gated_rms_norm runs as 'separate', not as a kernel: the kernel needs whole heads, and a device has 128 channels, "
        "of heads of 256"
    ]


def test_second_derivatives_are_refused():
    x, scale = jnp.ones((1, 4, 128)), jnp.ones(128)
    objective = lambda x: jnp.sum(ops.gated_rms_norm(x, x, scale, epsilon=1.0, backend="pallas"))  # noqa: E731
    with pytest.raises(UserError, match=r"no second derivatives; use backend='separate'"):
        jax.grad(lambda x: jnp.sum(jax.grad(objective)(x)))(x)
