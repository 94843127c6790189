"""The kernels of linear attention: tiles, blocks of heads and what they take of VMEM, and channels of zeros."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import backends, linear_attention
from jaxlinear.ops.linear_attention import op
from jaxlinear.pallas.linear_attention import blocks
from jaxlinear.pallas.parts.target import Target
from tests import numerics
from tests.pallas import kernel_cases
from tests.pallas.kernel_cases import ids_of

as_the_recurrence = functools.partial(kernel_cases.assert_as_the_recurrence, "linear_attention")


def draw(seed, *sizes):
    return kernel_cases.draw("linear_attention", np.random.default_rng(seed), *sizes)


@pytest.mark.parametrize("decay, packed", [("constant", False), ("scalar", True), ("channel", True)])
def test_gpu_by_tiles(monkeypatch, decay, packed, use):
    """K and V take several tiles, the last of them partial; the outputs take two programs."""
    monkeypatch.setattr(blocks, "gpu", lambda *_: blocks.GPUBlock(16, 16, 16, 32, 32, 16, 32))
    use("gpu")
    as_the_recurrence(draw(7, decay, 40, 2, 40, 50), segment_ids=ids_of(5, 27, 8) if packed else None)


@pytest.mark.parametrize("decay, packed", [("none", True), ("constant", True), ("scalar", False)])
def test_chunks_of_128_on_gpu(decay, packed, use):
    assert blocks.gpu(256, 64, decay, packed, None, None).chunk == 128
    use("gpu")
    as_the_recurrence(draw(7, decay, 256, 1, 40, 24), segment_ids=ids_of(5, 200, 51) if packed else None)


@pytest.mark.parametrize("length", [100, 300])
def test_in_the_blocks_of_v6e(length, monkeypatch):
    """Chunks of 256 tokens, or of 128 if those hold all."""
    kind = "TPU v6 lite"
    assert blocks.tpu(kind, length, 1, (128, 128), False, None, 4)[1] == (128 if length == 100 else 256)
    monkeypatch.setattr(backends, "target", lambda: Target("tpu", kind, True))
    as_the_recurrence(draw(9, "scalar", length, 1, 128, 128), segment_ids=ids_of(5, length - 30, 25))


@pytest.mark.slow(but=["scalar"])
@pytest.mark.parametrize("decay", ["constant", "scalar", "channel"])
def test_the_gradient_takes_half_as_many_heads_at_once(monkeypatch, decay):
    """And runs through the chunks of several heads, each with the products of others made before its own turn."""
    wider = blocks.Block(64, 32, 256)
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", (wider, wider))
    assert blocks.tpu("none", 100, 4, (64, 64), decay == "channel", 32, 4) == (64, 32, (4, 2))
    check_heads(4, decay)


def check_heads(heads, decay):
    as_the_recurrence(draw(11, decay, 100, heads, 64, 64), segment_ids=ids_of(5, 70, 25))


@pytest.mark.slow
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


@pytest.mark.slow(cases=["16-32-16"])
@pytest.mark.parametrize("heads, keys, values", [(16, 32, 16), (5, 64, 128), (3, 128, 64)])
def test_heads_that_share_registers(short_chunks, heads, keys, values):
    """Of keys, values or both; in the last block, if it has fewer heads, with some that are arbitrary."""
    as_the_recurrence(draw(12, "channel", 20, heads, keys, values))


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
    as_the_recurrence(draw(3, decay, 25, 2, 13, 11), segment_ids=ids_of(5, 12, 8))


@pytest.mark.parametrize(
    "platform, heads, keys, values, key_heads, channels",
    [
        ("tpu", 16, 153, 113, None, (7, 15)),
        ("tpu", 8, 153, 113, None, (0, 0)),
        ("tpu", 16, 72, 64, None, (8, 0)),
        ("tpu", 16, 80, 64, None, (0, 0)),
        ("tpu", 16, 100, 65, 1, (12, 15)),
        ("tpu", 16, 100, 64, 1, (0, 0)),
        ("gpu", 2, 153, 113, None, (7, 15)),
        ("gpu", 2, 152, 120, None, (0, 0)),
        ("gpu", 2, 64, 65, None, (0, 15)),
        ("gpu", 2, 65, 1002, None, (0, 0)),
        ("cpu", 16, 153, 113, None, (0, 0)),
    ],
)
def test_which_widths_have_channels_of_zeros(platform, heads, keys, values, key_heads, channels):
    q, v = (jax.ShapeDtypeStruct((1, 9, *s), jnp.bfloat16) for s in ((key_heads or heads, keys), (heads, values)))
    assert op.padding(q, q, v, platform) == channels


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
