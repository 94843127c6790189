"""The kernels of linear attention, interpreted, against the oracles: values, last states and all gradients, on the inputs
of the operation's tests."""

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
from jaxlinear.ops import backends, linear_attention, protocol
from jaxlinear.ops.linear_attention import op
from jaxlinear.ops.linear_attention.family import Inputs, LinearAttentionKernel
from jaxlinear.ops.linear_attention.op import choose
from jaxlinear.pallas.linear_attention import blocks
from jaxlinear.pallas.parts.target import Target
from tests import numerics
from tests.ops import test_linear_attention as operation

INTERPRETED, GPU = Target("tpu", "none", True), Target("gpu", "none", True)
RATE = 204.45 * 2**-7  # rounding to bfloat16 makes it smaller by 0.2%
RUNS = [
    *((name, "float64") for name in operation.CASES),
    *((name, dtype) for name in ("scalar", "channel") for dtype in ("float32", "bfloat16")),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Two chunks per block if the decay is per head or there is none, one if it is per channel."""
    small = blocks.Block(64, 32, 1), blocks.Block(32, 32, 1)
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", small)


def run_kernel(ids, target, q, k, v, log_decay, state):
    starts = None if ids is None else protocol.UNSHARDED.starts(jnp.asarray(ids))
    wide = np.promote_types(state.dtype, np.float32)
    family = LinearAttentionKernel(q.shape[-1] ** -0.5, None, target)
    return family.through(Inputs(q, k, v, log_decay, starts, None), state.astype(wide))


def check(name, dtype, target=INTERPRETED):
    inputs, cotangents, ids, outputs, gradients = operation.case(name)
    run = functools.partial(run_kernel, ids, target)
    found, found_gradients = numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert [y.dtype for y in jax.tree.leaves((found[0], found_gradients))] == [dtype] * len(
        jax.tree.leaves((found[0], inputs))
    )


@pytest.mark.slow(
    but=[
        *(f"{name}-float64-tpu" for name in ("one_token", "none", "constant_packed", "no_documents")),
        *(f"{name}-float64-gpu" for name in ("short", "constant", "channel")),
        *("channel-float32-tpu", "scalar-float32-gpu"),
        *(f"{name}-bfloat16-{platform}" for name in ("scalar", "channel") for platform in ("tpu", "gpu")),
    ]
)
@pytest.mark.parametrize("target", [INTERPRETED, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("name, dtype", RUNS)
def test_values_and_gradients(small_blocks, name, dtype, target):
    check(name, dtype, target)


@pytest.mark.parametrize("target", [INTERPRETED, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("kind", ["none", "channel"])
def test_states_of_bfloat16_are_float32(short_chunks, kind, target):
    operation.assert_states_are_float32(functools.partial(run_kernel, None, target), kind)


@pytest.mark.parametrize("name", ["short", "channel_whole_chunks"])
def test_on_a_simulated_tpu(small_blocks, name):
    """With TPU memories and copies; reads beyond an array or of unwritten memory give NaN."""
    check(name, "float32", Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan")))


@pytest.mark.slow(but_nth=3)  # TPU and GPU in turn
@pytest.mark.parametrize("target", [INTERPRETED, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("name", ["none", "constant_packed", "no_documents", "channel"])
def test_a_run_without_its_outputs(small_blocks, name, target):
    """The map of a run, and the gradient of the state alone."""
    inputs, cotangents, ids, outputs, gradients = operation.case(name)
    family = LinearAttentionKernel(inputs[0].shape[-1] ** -0.5, None, target)

    @numerics.jit
    def both(inputs, d_o, d_final):
        *arrays, state = inputs
        run = Inputs(*arrays, None if ids is None else protocol.UNSHARDED.starts(jnp.asarray(ids)), None)
        return family.advance(family.summary(run), state), family.state_gradient(run, d_o, d_final)

    found = numerics.run(both, inputs, *cotangents, dtype="float64")
    numerics.assert_close(found, (outputs[1], gradients[4]), 1e-10)


def assert_as_the_recurrence(run, ids, inputs):
    """``run`` equals the recurrence in float64."""
    random = np.random.default_rng(8)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[4].shape)
    recurrent = functools.partial(linear_attention, segment_ids=ids, backend="recurrent")
    expected, found = (
        numerics.run(numerics.with_gradients(x), inputs, cotangents, dtype="float64") for x in (recurrent, run)
    )
    numerics.assert_close(found, numerics.wide(expected), 1e-10)


def draw(random, decay, length, heads, keys, values):
    q, k, v, state = (
        numerics.normal(random, *shape)
        for shape in (*[(1, length, heads, keys)] * 2, (1, length, heads, values), (1, heads, keys, values))
    )
    return q, k, v, operation.draw_decay(random, decay, 1, length, heads, keys), state


@pytest.mark.parametrize("decay, packed", [("constant", False), ("scalar", True), ("channel", True)])
def test_gpu_by_tiles(monkeypatch, decay, packed):
    """K and V take several tiles, the last of them partial; the outputs take two programs."""
    monkeypatch.setattr(blocks, "gpu", lambda *_: blocks.GPUBlock(16, 16, 16, 32, 32, 16, 32))
    ids = np.repeat([[0, 1, 2]], [5, 27, 8], axis=1).astype(np.int32) if packed else None
    inputs = draw(np.random.default_rng(7), decay, 40, 2, 40, 50)
    assert_as_the_recurrence(functools.partial(run_kernel, ids, GPU), ids, inputs)


@pytest.mark.parametrize("decay, packed", [("none", True), ("constant", True), ("scalar", False)])
def test_chunks_of_128_on_gpu(decay, packed):
    assert blocks.gpu(256, 64, decay, packed, None, None).chunk == 128
    ids = np.repeat([[0, 1, 2]], [5, 200, 51], axis=1).astype(np.int32) if packed else None
    inputs = draw(np.random.default_rng(7), decay, 256, 1, 40, 24)
    assert_as_the_recurrence(functools.partial(run_kernel, ids, GPU), ids, inputs)


@pytest.mark.parametrize("length", [100, 300])
def test_in_the_blocks_of_v6e(length):
    """Chunks of 256 tokens, or of 128 if those hold all."""
    kind = "TPU v6 lite"
    assert blocks.tpu(kind, length, 1, (128, 128), False, None, 4)[1] == (128 if length == 100 else 256)
    ids = np.repeat([[0, 1, 2]], [5, length - 30, 25], axis=1).astype(np.int32)
    inputs = draw(np.random.default_rng(9), "scalar", length, 1, 128, 128)
    assert_as_the_recurrence(functools.partial(run_kernel, ids, Target("tpu", kind, True)), ids, inputs)


@pytest.mark.slow(but=["scalar"])
@pytest.mark.parametrize("decay", ["constant", "scalar", "channel"])
def test_the_gradient_takes_half_as_many_heads_at_once(monkeypatch, decay):
    """And runs through the chunks of several heads, each with the products of others made before its own turn."""
    wider = blocks.Block(64, 32, 256)
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", (wider, wider))
    assert blocks.tpu("none", 100, 4, (64, 64), decay == "channel", 32, 4) == (64, 32, (4, 2))
    check_heads(4, decay)


def check_heads(heads, decay):
    ids = np.repeat([[0, 1, 2]], [5, 70, 25], axis=1).astype(np.int32)
    inputs = draw(np.random.default_rng(11), decay, 100, heads, 64, 64)
    assert_as_the_recurrence(functools.partial(run_kernel, ids, INTERPRETED), ids, inputs)


def test_a_block_of_heads_in_groups(monkeypatch):
    """Two groups share a register, and the last block has one head."""
    wider = blocks.Block(64, 32, 512)
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", (wider, wider))
    monkeypatch.setattr(blocks, "together", lambda *_: 3)
    monkeypatch.setattr(blocks, "heads_of_block", lambda *_: 4)
    check_heads(5, "channel")


def test_what_heads_take_of_vmem():
    """With all at once, the first two would take 70.5 and 67.7 MiB of the 64 that there are; the others fit."""
    shapes = (8, 240, 240), (8, 248, 248), (8, 200, 136), (8, 128, 256)
    assert [blocks.together(heads, 128, 128, k, v, 4) for heads, k, v in shapes] == [4, 4, 8, 8]
    assert blocks.together(8, 128, 128, 256, 512, 2) == 8
    assert blocks.tpu("", 4000, 4, (160, 160), True, None, 4) == (256, 128, (4, 4))
    of_v6e = functools.partial(blocks.tpu, "TPU v6 lite", 4000, 8, (240, 240), False, None)
    assert of_v6e(2) == (256, 256, (8, 8)) and of_v6e(4) == (128, 128, (8, 8))


@pytest.mark.parametrize("heads, keys, values", [(16, 32, 16), (5, 64, 128), (3, 128, 64)])
def test_heads_that_share_registers(short_chunks, heads, keys, values):
    """Of keys, values or both; in the last block, if it has fewer heads, with some that are arbitrary."""
    inputs = draw(np.random.default_rng(12), "channel", 20, heads, keys, values)
    assert_as_the_recurrence(functools.partial(run_kernel, None, INTERPRETED), None, inputs)


# Inputs at the limits


@functools.cache
def in_float32(packed, target):
    ids = np.arange(100)[None] if packed else None
    return numerics.with_gradients(functools.partial(run_kernel, ids, target))


def assert_right_in_float32(inputs, target, packed=False):
    random = np.random.default_rng(3)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[4].shape)
    expected = numerics.run(operation.reference(packed), inputs, cotangents, dtype="float64")
    found = numerics.run(in_float32(packed, target), inputs, cotangents, dtype="float32")
    numerics.assert_close(found, expected, 1e-5)


@pytest.mark.slow(but=["scalar-tpu", "channel-tpu", "channel-gpu"])
@pytest.mark.parametrize("target", [INTERPRETED, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("kind", ["constant", "scalar", "channel"])
def test_hard_decays(small_blocks, kind, target):
    """Decays strong and weak in one chunk, equal for all, or weak only at a chunk's end."""
    hard = [
        lambda random, shape: random.choice([-50.0, -1e4, -1e-7, -1e-3, 0.0], shape),
        *(lambda _, shape, value=value: np.full(shape, value) for value in (-1e-7, -50.0, -np.inf)),
    ]
    for draw in hard:
        assert_right_in_float32(operation.at_the_limits(kind, draw), target)
    if kind != "constant":
        inputs = operation.at_the_limits(kind, hard[2])
        inputs[3][:, 50:] = -0.01
        assert_right_in_float32(inputs, target)


@pytest.mark.slow(cases=["channel-target1"])
@pytest.mark.parametrize("kind, target", [("scalar", INTERPRETED), ("channel", INTERPRETED), ("channel", GPU)])
def test_one_document_a_token(small_blocks, kind, target):
    inputs = operation.at_the_limits(kind, lambda random, shape: -random.uniform(0, 1, shape))
    assert_right_in_float32(inputs, target, packed=True)


@pytest.mark.parametrize("target", [INTERPRETED, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_float32_decays_beside_products_in_bfloat16(small_blocks, kind, target):
    assert_decays_are_not_rounded(functools.partial(run_kernel, None, target), kind)


def assert_decays_are_not_rounded(run, kind):
    """A state of ones and a first token are read after up to 31 others, as e^-51; with rounding it would be 11% more."""
    q, shape = jnp.ones((1, 32, 1, 16), jnp.bfloat16), (1, 32, 1, 16) if kind == "channel" else (1, 32, 1)
    k = q.at[:, 1:].set(0)
    o, final = run(q, k, k, jnp.full(shape, -RATE, jnp.float32), jnp.ones((1, 1, 16, 16)))
    expected = np.exp(-RATE * np.arange(32)) * (1 + np.exp(-RATE))
    np.testing.assert_allclose(o[0, :, 0], np.repeat(16**0.5 * expected[:, None], 16, axis=1), rtol=1.2e-2)
    np.testing.assert_allclose(final, np.full(final.shape, expected[-1]), rtol=1.2e-2)


# What is chosen and what is refused


def test_one_kernel_each_way():
    x = jnp.ones((1, 130, 2, 4))
    operation = lambda q, k, v: jnp.sum(linear_attention(q, k, v, backend="pallas")[0] ** 2)  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(operation, (0, 1, 2)))(x, x, x))
    assert re.findall(r" name=(linear_attention_\w+)", text) == [
        "linear_attention_forward",
        "linear_attention_gradient",
    ]
    # For the state's gradient alone, nothing as long as the sequence is kept or written.
    of_state = jax.grad(lambda state: jnp.sum(linear_attention(x, x, x, None, state, backend="pallas")[0]))
    assert "linear_attention_state_gradient" in str(jax.make_jaxpr(of_state)(jnp.ones((1, 2, 4, 4))))


def test_the_operation_takes_it(small_blocks):
    """With segment ids, a scale, values of another dtype, no initial state, and chunks of 16 tokens."""
    random = np.random.default_rng(1)
    q, v = (numerics.normal(random, 1, 20, 2, width) for width in (4, 3))
    ids = np.array([[0] * 7 + [1] * 13], np.int32)
    results = []
    for backend, chunk in (("recurrent", None), ("pallas", 16)):
        run = functools.partial(linear_attention, scale=0.3, segment_ids=ids, chunk_size=chunk, backend=backend)
        narrow = numerics.jit(lambda q, v, run=run: run(q, q, v.astype(jnp.bfloat16), -jnp.ones(2, q.dtype)))
        results.append(numerics.run(narrow, q, v, dtype="float32"))
    assert [y.dtype for y in results[1]] == [jnp.bfloat16, jnp.float32]
    numerics.assert_close(results[1][1], results[0][1], 1e-5)
    numerics.assert_close(results[1][0], results[0][0], 1e-2)


@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "channel"])
def test_channels_of_zeros_change_nothing(monkeypatch, short_chunks, decay):
    """As where too many heads would have to be in one block, or rows would not be aligned."""
    monkeypatch.setattr(op, "padding", lambda *_: (3, 5))
    ids = np.repeat([[0, 1, 2]], [5, 12, 8], axis=1).astype(np.int32)
    inputs = draw(np.random.default_rng(3), decay, 25, 2, 13, 11)
    run = functools.partial(linear_attention, segment_ids=ids, backend="pallas")
    assert_as_the_recurrence(run, ids, inputs)


def test_which_widths_have_channels_of_zeros():
    def padding(platform, heads, keys, values, key_heads=None):
        q, v = (
            jax.ShapeDtypeStruct((1, 9, n, width), jnp.bfloat16)
            for n, width in ((key_heads or heads, keys), (heads, values))
        )
        return op.padding(q, q, v, platform)

    assert padding("tpu", 16, 153, 113) == (7, 15) and padding("tpu", 8, 153, 113) == (0, 0)
    assert padding("tpu", 16, 72, 64) == (8, 0) and padding("tpu", 16, 80, 64) == (0, 0)
    assert padding("tpu", 16, 100, 65, key_heads=1) == (12, 15) and padding("tpu", 16, 100, 64, key_heads=1) == (0, 0)
    assert padding("gpu", 2, 153, 113) == (7, 15) and padding("gpu", 2, 152, 120) == (0, 0)
    assert padding("gpu", 2, 64, 65) == (0, 15) and padding("gpu", 2, 65, 1002) == (0, 0)
    assert padding("cpu", 16, 153, 113) == (0, 0)


def test_auto_takes_it_where_it_runs(caplog):
    def array(length=9, width=32, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, length, 2, width), dtype)

    x, wide, full = array(), array(width=512), array(dtype=jnp.float32)
    assert numerics.form(choose, "auto", x, x, x) == "chunked"
    log_once._logged.clear()
    for platform in backends.COMPILED:
        with backends.use_platform(platform, "some kind"), caplog.at_level(logging.INFO, logger="jaxlinear"):
            assert numerics.form(choose, "auto", x, x, x) == "pallas"
            assert numerics.form(choose, "auto", full, x, full) == ("pallas" if platform == "tpu" else "chunked")
            assert numerics.form(choose, "auto", *[array(length=8)] * 3) == "recurrent"
            assert numerics.form(choose, "auto", wide, wide, x) == "chunked"
            assert numerics.form(choose, "chunked", x, x, x) == "chunked"
    said = "linear_attention runs as 'chunked', not as a kernel: the kernel takes "
    assert [record.getMessage() for record in caplog.records] == [
        f"{said}K from 16 to 256 and V of at least 16, not K = 512",
        f"{said}bfloat16, not float32",
    ]


def test_what_it_does_not_take_is_refused():
    def run(heads=1, key=32, value=32, dtype=jnp.float32, **options):
        q, v = (jnp.ones((1, 20, heads, width), dtype) for width in (key, value))
        linear_attention(q, q, v, backend="pallas", **options)

    with pytest.raises(
        UserError, match="chunks of a power of two from 8 to 256 tokens, not of 48; use backend='chunked'"
    ):
        run(chunk_size=48)
    with backends.use_platform("tpu", "TPU v5 lite"):
        with pytest.raises(UserError, match="takes float32 and bfloat16, not float16"):
            run(dtype=jnp.float16)
        with pytest.raises(UserError, match="K from 16 to 256 and V of at least 16, not V = 8"):
            run(value=8)
        with pytest.raises(
            UserError, match=r"at most 8 heads at a time, and 12 heads with K, V = \(32, 167\) need more"
        ):
            run(heads=12, value=1002)
        with pytest.raises(UserError, match="takes chunks of 128 tokens, not of 64"):
            run(chunk_size=64)
    with jax.enable_x64(True), backends.use_platform("tpu", ""), pytest.raises(UserError, match="not float64"):
        run(dtype=jnp.float64)


def test_the_map_of_a_run_has_no_gradient():
    x = jnp.ones((1, 5, 2, 4))
    family = LinearAttentionKernel(1.0, None, INTERPRETED)
    with pytest.raises(UserError, match="the kernel has no gradient for the map of a run"):
        jax.grad(lambda k: jnp.sum(family.summarise(family.prepare(Inputs(x, k, x, None, None, None), None))[1]))(x)


@pytest.mark.parametrize("widths", [(16, 16), (32, 64), (48, 128), (128, 128), (64, 256), (256, 256), (100, 100)])
def test_heads_of_a_block(widths):
    """They fill whole registers, or are all heads. There are more if the table asks for that and their number divides H."""
    for heads in (1, 2, 3, 8, 12, 16):
        for lanes in (0, 256, 1024):
            count = blocks.heads_of_block(heads, widths, lanes)
            if widths == (100, 100) and heads > 8:
                assert count is None
                continue
            assert count == heads or all(count * width % 128 == 0 for width in widths)
            assert count <= 8
