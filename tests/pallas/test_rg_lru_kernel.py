"""The kernels of the RG-LRU, gates and recurrence in one, interpreted, against a loop: values and all gradients."""

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
from jaxlinear.pallas.rg_lru import bands, blocks
from jaxlinear.pallas.rg_lru import gpu as rg_lru_gpu
from jaxlinear.pallas.rg_lru import tpu as rg_lru_tpu
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.ops.test_rg_lru_recurrence import draw, operation, reference
from tests.shards import make_mesh

# name: B, T, N, K, packed
CASES = {
    "one_token": (1, 1, 2, 3, True),
    "several_in_a_register": (2, 20, 16, 32, True),  # two groups of eight
    "between_registers": (2, 300, 4, 96, True),  # a group of four in three registers, and three blocks of time
    "griffin": (1, 17, 8, 160, False),  # two groups
    "whole_blocks": (2, 256, 2, 128, True),
    "whole_blocks_without_documents": (2, 256, 2, 64, False),
    "last_register_in_part": (2, 40, 2, 160, True),
    "odd": (1, 130, 3, 77, False),
}
TPU, GPU = (Target(platform, "none", True) for platform in ("tpu", "gpu"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "TIME", (128,))
    monkeypatch.setattr(blocks, "ROWS", 64)
    monkeypatch.setattr(blocks, "CHANNELS", 256)
    monkeypatch.setattr(blocks, "GPU_CHANNELS", 128)
    monkeypatch.setattr(blocks, "GPU_ROWS", (4, 2))
    monkeypatch.setattr(blocks, "GPU_TIME", 16)


@pytest.fixture
def use(monkeypatch):
    return lambda target: monkeypatch.setattr(backends, "target", lambda: target)


@functools.cache
def case(name):
    *sizes, packed = CASES[name]
    inputs, first, ids = draw(*sizes)
    if not packed:
        ids, first = None, first & (np.arange(first.shape[1]) == 0)
    random = np.random.default_rng(1)
    cotangents = numerics.normal(random, *inputs[0].shape), numerics.normal(random, *inputs[-1].shape)
    loop = numerics.with_gradients(reference(first, ids))
    return inputs, first, ids, cotangents, numerics.wide(numerics.run(loop, inputs, cotangents, dtype="float64"))


def check(name, dtype, tolerance):
    inputs, first, ids, cotangents, (outputs, gradients) = case(name)
    run = numerics.with_gradients(operation(first, ids, "pallas"))
    found, found_gradients = numerics.run(run, inputs, cotangents, dtype=dtype)
    assert found[0].dtype == found[1].dtype == ("float64" if dtype == "float64" else "float32")
    assert {y.dtype.name for y in found_gradients} == {dtype}
    numerics.assert_close(found, outputs, tolerance)
    numerics.assert_close(found_gradients, gradients, tolerance)


@pytest.mark.slow(
    but=[
        *(f"tpu-{name}" for name in ("one_token", "griffin", "whole_blocks", "last_register_in_part", "odd")),
        *(f"gpu-{name}" for name in ("one_token", "whole_blocks", "odd")),
    ]
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
def test_values_and_gradients(name, target, use):
    use(target)
    check(name, "float64", 1e-12)


@pytest.mark.parametrize("name", ["whole_blocks_without_documents", "odd"])
def test_programs_that_occupy_a_gpu(name, use, monkeypatch):
    """They go through all of time, without what else they need for its parts."""
    monkeypatch.setattr(blocks, "GPU_PROGRAMS", 1)
    monkeypatch.setattr(blocks, "GPU_ROWS", (4, 2 if name == "odd" else 8))
    monkeypatch.setattr(rg_lru_gpu.scan, "forward", None)
    use(GPU)
    check(name, "float64", 1e-12)


@pytest.mark.slow(
    but=["tpu-float32-several_in_a_register", "tpu-bfloat16-between_registers", "gpu-bfloat16-several_in_a_register"]
)
@pytest.mark.parametrize("name", ["several_in_a_register", "between_registers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
def test_narrow_numbers(name, dtype, target, use):
    use(target)
    check(name, dtype, numerics.TOLERANCES[dtype])


@pytest.mark.slow(but=["last_register_in_part"])
@pytest.mark.parametrize("name", ["between_registers", "last_register_in_part"])
def test_on_a_simulated_tpu(use, name):
    """With TPU memories and copies; reads beyond an array or of unwritten memory give NaN."""
    use(Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan")))
    check(name, "float32", 1e-5)


@pytest.mark.parametrize("bias", [-200.0, -18.0, 200.0])
def test_at_every_decay(bias, use):
    use(GPU)
    check_decay(bias)


def check_decay(bias):
    """At -200 a is 1, and at 200 at its smallest; neither depends on the gate. At -18 a is close to 1."""
    (x, kernel, _, *others), first, ids = draw(1, 20, 2, 8)
    inputs, cotangents = (x, kernel, np.full(16, bias), *others), (np.ones(x.shape), np.ones(others[-1].shape))
    run = lambda backend: numerics.with_gradients(operation(first, ids, backend))  # noqa: E731
    found, expected = (numerics.run(run(name), inputs, cotangents, dtype="float32") for name in ("pallas", "separate"))
    for y, want in zip(jax.tree.leaves(found), jax.tree.leaves(numerics.wide(expected)), strict=True):
        assert np.max(np.abs(y - want)) <= 1e-5 * max(0.1, np.max(np.abs(want)))


def test_another_document_cannot_be_seen(use):
    """On GPU not even an infinity in the state gets across, in either direction."""
    use(GPU)
    inputs, first, ids = draw(1, 70, 1, 4)
    *of_gates, state = numerics.cast(inputs, "float32")
    ids, first = (np.arange(70)[None] >= 40).astype(np.int32), np.arange(70)[None] == 40

    @numerics.jit
    def run(state, d_h):
        options = {"segment_ids": ids, "backend": "pallas"}
        op = lambda x, state: ops.rg_lru(x, *of_gates[1:], jnp.asarray(first), state, **options)[0]  # noqa: E731
        h, pullback = jax.vjp(op, of_gates[0], state)
        return h, *pullback(d_h)

    d_h = np.ones((1, 70, 4), np.float32)
    (h, d_x, d_state), (_, ill_d_x, ill_d_state) = run(state, d_h), run(state, np.where(ids[..., None], np.inf, d_h))
    ill_h, *_ = run(np.full_like(state, np.inf), d_h)
    assert not np.isfinite(ill_h[0, 39]).any() and not np.isfinite(ill_d_x[0, 40]).any()
    assert np.array_equal(ill_h[0, 40:], h[0, 40:]) and np.isfinite(h[0, 40:]).all()
    assert np.array_equal(ill_d_x[0, :40], d_x[0, :40]) and np.array_equal(ill_d_state, d_state)


def test_channels_of_a_block():
    """VMEM has room for them and for the most tokens, and there is a block for each core."""

    def chosen(kind, blocks_of_w, block, dtype, length=4096):
        x = jax.ShapeDtypeStruct((1, length, blocks_of_w * block), dtype)
        kernel = jax.ShapeDtypeStruct((2, blocks_of_w, block, block), jnp.float32)
        shape = bands.shape_of(x, kernel, rg_lru_tpu._needed(x.dtype.itemsize), Target("tpu", kind))
        return shape.group, shape.time

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TIME", (512, 256, 128))
        patch.setattr(blocks, "CHANNELS", 1024)
        assert chosen("TPU v5 lite", 16, 160, "bfloat16") == (1280, 512)
        assert chosen("TPU v5 lite", 16, 160, "float32") == (640, 512)
        assert chosen("TPU v5 lite", 32, 176, "bfloat16") == (1408, 512)
        assert chosen("TPU v5 lite", 32, 176, "float32") == (1408, 256)
        assert chosen("TPU v5 lite", 16, 256, "bfloat16") == (1024, 512)
        assert chosen("TPU v5 lite", 16, 256, "bfloat16", 300) == (1024, 128)
        assert chosen("TPU v5 lite", 8, 160, "bfloat16") == (1280, 512)
        assert chosen("TPU v5", 8, 160, "bfloat16") == (640, 512)
        assert chosen("TPU v5", 4, 176, "bfloat16") == (704, 512)


@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("target, packed", [(TPU, True), (TPU, False), (GPU, True)], ids=["tpu", "unpacked", "gpu"])
def test_on_a_mesh(sizes, target, packed, use):
    use(target)
    inputs, first, ids = draw(4, 32, 4, 3)
    inputs, ids = (inputs, ids) if packed else ((*inputs[:-1], 0 * inputs[-1]), None)
    random = np.random.default_rng(1)
    cotangents = numerics.normal(random, *inputs[0].shape), numerics.normal(random, *inputs[-1].shape)
    expected = numerics.run(numerics.with_gradients(reference(first, ids)), inputs, cotangents, dtype="float64")

    @numerics.with_gradients
    def run(*inputs):
        *of_gates, state = inputs
        state = state if packed else None
        return operations.rg_lru(*of_gates, jnp.asarray(first), state, segment_ids=ids, backend="pallas")

    with sharding.use_mesh(make_mesh(sizes)):
        found, gradients = numerics.run(run, inputs, cotangents, dtype="float64")
    outputs, expected = numerics.wide(expected)
    numerics.assert_close(found, outputs, 1e-12)
    numerics.assert_close(gradients[: 7 if packed else 6], expected[: 7 if packed else 6], 1e-12)


def test_over_time_gates_and_recurrence_are_separate():
    inputs, first, ids = draw(2, 32, 4, 3)
    *of_gates, state = numerics.cast(inputs, "float32")
    with sharding.use_mesh(make_mesh({"data": 2, "sequence": 4})):
        found = operations.rg_lru(*of_gates, jnp.asarray(first), state, segment_ids=jnp.asarray(ids))
        with pytest.raises(UserError, match=r"needs whole rows, and mesh.sequence shards them; use backend='separate'"):
            operations.rg_lru(*of_gates, jnp.asarray(first), state, backend="pallas")
    expected = numerics.run(reference(first, ids), *inputs, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), 1e-5)


@pytest.mark.parametrize("target", [TPU, GPU], ids=["tpu", "gpu"])
def test_second_derivatives_are_refused(target, use):
    use(target)
    inputs, first, _ = draw(1, 4, 1, 2)
    x, *others, state = numerics.cast(inputs, "float32")
    run = lambda x: ops.rg_lru(x, *others, jnp.asarray(first), state, backend="pallas")[0]  # noqa: E731
    with pytest.raises(UserError, match=r"no second derivatives; use backend='separate'"):
        jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(run(x)))(x)))(x)
