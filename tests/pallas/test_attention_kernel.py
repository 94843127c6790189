"""The attention kernels: which blocks they visit and of what sizes, documents, and what they sum in float32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from jaxlinear.errors import UserError
from jaxlinear.ops import causal_attention, sliding_window_attention
from jaxlinear.pallas.attention import blocks
from jaxlinear.pallas.attention import tpu as attention_tpu
from tests import numerics
from tests.ops import test_attention as full
from tests.pallas import kernel_cases

each_platform = pytest.mark.parametrize("target", kernel_cases.PLATFORMS)


@each_platform
def test_logits_and_sums_of_bfloat16_are_float32(small_blocks, target, use):
    use(target)
    full.test_logits_of_bfloat16_are_not_rounded_to_it("pallas")
    full.test_sums_of_bfloat16_are_float32("pallas")


@each_platform
def test_an_id_used_again_names_another_document(small_blocks, target, use):
    """Keys are equal, so that the output is the mean of the values seen."""
    use(target)
    q = k = jnp.ones((1, 6, 1, 2))
    v = jnp.arange(1.0, 7.0)[None, :, None, None]
    o = sliding_window_attention(q, k, v, window=6, segment_ids=jnp.array([[1, 1, 2, 2, 1, 1]]), backend="pallas")
    numerics.assert_close(o[0, :, 0, 0], np.array([1, 1.5, 3, 3.5, 5, 5.5]), 1e-6)


@pytest.mark.parametrize("window, offset", [(1, 0), (5, 0), (16, 3), (17, 8), (40, 8)])
def test_the_mask_of_blocks_is_that_of_pairs(window, offset):
    found = attention_tpu._Window((32, 40), window, offset)
    expected = masks.LocalMask((32, 40), (window - 1, 0), offset)
    for rows in range(0, 32, 8):
        for columns in range(0, 40, 8):
            index = slice(rows, rows + 8), slice(columns, columns + 8)
            assert np.array_equal(np.broadcast_to(found[index], (8, 8)), expected[index])
    kernels, _ = mask_info.process_mask(masks.MultiHeadMask([expected]), (8, 8))
    seen = expected[:, :].reshape(4, 8, 5, 8).any(axis=(1, 3))
    assert found.visited(8) == np.count_nonzero(seen) == np.count_nonzero(kernels.block_mask)


@pytest.mark.parametrize(
    "kind, length, window, channels, size, tokens",
    [
        ("TPU v5 lite", 8192, 8192, 128, 2, 1024),
        ("TPU v5 lite", 8192, 1024, 128, 2, 512),  # half of the keys of larger blocks would not be seen
        ("TPU v5 lite", 8192, 8192, 256, 2, 1024),
        ("TPU v5 lite", 8192, 8192, 257, 2, 512),
        ("TPU v5 lite", 8192, 8192, 64, 4, 512),
        ("TPU v5 lite", 8192, 256, 64, 4, 256),
        ("TPU v5 lite", 8192, 8192, 193, 4, 256),
        ("TPU v6 lite", 1023, 1023, 128, 2, 512),
        ("TPU v6 lite", 300, 8192, 128, 2, 384),
        ("another", 8192, 8192, 128, 2, 512),
    ],
)
def test_sizes_of_blocks(kind, length, window, channels, size, tokens):
    assert blocks.tpu(kind, length, window, channels, size) == tokens


def test_blocks_that_no_query_sees_are_not_visited(small_blocks):
    """Of 32 x 32 blocks, a window as long as a block touches two per row."""
    x = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)
    operation = functools.partial(sliding_window_attention, window=128, backend="pallas")
    text = str(jax.make_jaxpr(operation)(x, x, x))
    assert re.findall(r"grid=\((\d+), (\d+), (\d+)\)", text) == [("1", "32", "2")]


def test_shared_keys_under_x64_are_refused(small_blocks):
    """JAX's kernel then divides head indices by a 64-bit number, where everything else has 32 bits."""
    q, k = np.ones((1, 130, 4, 8), np.float32), np.ones((1, 130, 2, 8), np.float32)
    with jax.enable_x64(True):
        with pytest.raises(
            UserError, match="cannot share keys between heads under jax_enable_x64; use backend='chunked'"
        ):
            causal_attention(q, k, k, backend="pallas")
        assert causal_attention(q, q, q, backend="pallas").shape == q.shape


def test_work_that_the_kernels_for_gpu_say_they_do(small_blocks, use):
    """Per pair visited: 2 (K + V) forward, 2 (2 K + V) and 2 (2 K + 2 V) backward. Blocks of 16 queries that begin at 5,
    21, 37 and 53 see keys from 0, 2, 18 and 34 onwards: 1, 2, 2 and 2 blocks of 32 keys."""
    use("gpu")
    q, k, v = (jax.ShapeDtypeStruct((1, n, 4, width), jnp.float32) for n, width in ((64, 16), (69, 16), (69, 32)))

    def both(q, k, v):
        o, pullback = jax.vjp(functools.partial(sliding_window_attention, window=20, backend="pallas"), q, k, v)
        return pullback(o)

    found = [int(flops) for flops in re.findall(r"CostEstimate\(flops=(\d+)", str(jax.make_jaxpr(both)(q, k, v)))]
    pairs = 4 * (1 + 2 + 2 + 2) * 16 * 32
    assert found == [2 * pairs * 48, 2 * pairs * 64, 2 * pairs * 96]
