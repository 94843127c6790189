"""The attention kernels, interpreted, against the operations' oracles, on the inputs of their tests; and on meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, causal_attention, sliding_window_attention
from jaxlinear.ops.attention import op as attention
from jaxlinear.pallas.attention import blocks
from jaxlinear.pallas.attention import tpu as attention_tpu
from jaxlinear.pallas.parts.target import Target
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.ops import test_attention as full
from tests.ops import test_sliding_window as windows
from tests.shards import EIGHT, FOUR, IDS, TWO, T, make_mesh

softmax_tpu = blocks.tpu


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "tpu", lambda *_: 128)
    monkeypatch.setattr(blocks, "gpu", lambda *_: blocks.GPUBlock(16, 32, 4, 1))


@pytest.fixture(params=["tpu", "gpu"])
def target(request, monkeypatch):
    """The platform whose kernels are interpreted."""
    target = Target(request.param, "none", True)
    monkeypatch.setattr(backends, "target", lambda: target)
    return target


def check(operation, inputs, cotangents, outputs, gradients, dtype):
    found, found_gradients = numerics.run(numerics.with_gradients(operation), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert found.dtype == dtype


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize(
    "name, dtype",
    [*((name, "float32") for name in windows.CASES), ("grouped", "bfloat16"), ("more_keys_in_front", "bfloat16")],
)
def test_windows(name, dtype, target):
    inputs, cotangents, ids, *expected = windows.case(name)
    operation = functools.partial(
        sliding_window_attention, window=windows.CASES[name][6], segment_ids=ids, backend="pallas"
    )
    check(operation, inputs, cotangents, *expected, dtype)


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize("name", ["grouped", "keys_in_front", "whole", "long"])
def test_all_tokens(name, target):
    inputs, cotangents, ids, *expected = full.case(name)
    operation = functools.partial(causal_attention, segment_ids=ids, backend="pallas")
    check(operation, inputs, cotangents, *expected, "float32")


def test_logits_and_sums_of_bfloat16_are_float32(target):
    full.test_logits_of_bfloat16_are_not_rounded_to_it("pallas")
    full.test_sums_of_bfloat16_are_float32("pallas")


def test_on_a_simulated_tpu(monkeypatch):
    """With TPU memories and copies; memory that nothing wrote is NaN."""
    target = Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan"))
    monkeypatch.setattr(backends, "target", lambda: target)
    inputs, cotangents, ids, *expected = windows.case("long")
    operation = functools.partial(sliding_window_attention, window=70, segment_ids=ids, backend="pallas")
    check(operation, inputs, cotangents, *expected, "float32")


def test_an_id_used_again_names_another_document(target):
    """Keys are equal, so that the output is the mean of the values seen."""
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


@pytest.mark.slow(
    but=[
        f"sliding_window_attention-{EIGHT}-2-tpu",
        f"sliding_window_attention-{TWO}-2-tpu",
        f"sliding_window_attention-{TWO}-2-gpu",
        "causal_attention-{'data': 4, 'tensor': 2}-2-tpu",
    ]
)
@pytest.mark.parametrize(
    "operation, sizes, groups, target",
    [
        ("sliding_window_attention", {"data": 4, "tensor": 2}, 1, "tpu"),
        ("sliding_window_attention", {"fsdp": 4, "tensor": 2}, 2, "tpu"),
        ("sliding_window_attention", EIGHT, 2, "tpu"),
        ("sliding_window_attention", FOUR, 1, "tpu"),
        ("sliding_window_attention", TWO, 2, "tpu"),
        ("causal_attention", {"data": 4, "tensor": 2}, 2, "tpu"),
        ("sliding_window_attention", TWO, 2, "gpu"),
        ("causal_attention", {"data": 4, "tensor": 2}, 2, "gpu"),
    ],
    indirect=["target"],
    ids=str,
)
def test_on_a_mesh(operation, sizes, groups, target):
    random = np.random.default_rng(0)
    inputs = tuple(numerics.normal(random, 4, T, heads, 3) for heads in (4, groups, groups))
    cotangents = numerics.normal(random, *inputs[0].shape)
    options = {"window": 7} if operation.startswith("sliding") else {}
    results = []
    for module, backend, dtype in ((ops, "recurrent", "float64"), (operations, "pallas", "float32")):
        run = functools.partial(getattr(module, operation), segment_ids=IDS, backend=backend, **options)
        with sharding.use_mesh(make_mesh(sizes)):
            results.append(numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype=dtype))
    numerics.assert_close(results[1], numerics.wide(results[0]), 1e-5)


def test_what_is_chosen():
    q, k = jnp.ones((1, 256, 4, 64), jnp.bfloat16), jnp.ones((1, 256, 1, 64), jnp.bfloat16)
    assert numerics.form(attention.choose, "auto", q, k, k) == "chunked"  # on CPU
    with backends.use_platform("tpu", "TPU v5 lite"):
        assert numerics.form(attention.choose, "auto", q, k, k) == "pallas"
        assert numerics.form(attention.choose, "auto", q[:, -1:], k, k) == "chunked"  # one token: decoding
        assert numerics.form(attention.choose, "auto", q, k, k, offset=jnp.int32(0)) == "chunked"
    with backends.use_platform("gpu", "NVIDIA H100"):
        assert numerics.form(attention.choose, "auto", q, k, k) == "pallas"
        message = "sliding_window_attention: the kernel for GPU takes bfloat16, not float32; use backend='chunked'"
        with pytest.raises(UserError, match=message):
            sliding_window_attention(q.astype(jnp.float32), k, k, window=5, backend="pallas")
        with pytest.raises(UserError, match="the kernel for GPU takes up to 256 channels per head, not 288"):
            sliding_window_attention(q, k, jnp.ones((1, 256, 1, 288), k.dtype), window=5, backend="pallas")
    message = "the kernel for TPU takes up to 512 channels per head, not 520"
    with backends.use_platform("tpu", "TPU v5 lite"), pytest.raises(UserError, match=message):
        sliding_window_attention(q, k, jnp.ones((1, 256, 1, 520), k.dtype), window=5, backend="pallas")
    with pytest.raises(UserError, match="takes float32 and bfloat16, not float16"):
        causal_attention(*(x.astype(jnp.float16) for x in (q, k, k)), backend="pallas")


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
    assert softmax_tpu(kind, length, window, channels, size) == tokens


def test_blocks_that_no_query_sees_are_not_visited():
    """Of 32 x 32 blocks, a window as long as a block touches two per row."""
    x = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)
    operation = functools.partial(sliding_window_attention, window=128, backend="pallas")
    text = str(jax.make_jaxpr(operation)(x, x, x))
    assert re.findall(r"grid=\((\d+), (\d+), (\d+)\)", text) == [("1", "32", "2")]


def test_shared_keys_under_x64_are_refused():
    """JAX's kernel then divides head indices by a 64-bit number, where everything else has 32 bits."""
    q, k = np.ones((1, 130, 4, 8), np.float32), np.ones((1, 130, 2, 8), np.float32)
    with jax.enable_x64(True):
        with pytest.raises(
            UserError, match="cannot share keys between heads under jax_enable_x64; use backend='chunked'"
        ):
            causal_attention(q, k, k, backend="pallas")
        assert causal_attention(q, q, q, backend="pallas").shape == q.shape


def test_work_that_the_kernels_for_gpu_say_they_do(monkeypatch):
    """Per pair visited: 2 (K + V) forward, 2 (2 K + V) and 2 (2 K + 2 V) backward. Blocks of 16 queries that begin at 5,
    21, 37 and 53 see keys from 0, 2, 18 and 34 onwards: 1, 2, 2 and 2 blocks of 32 keys."""
    monkeypatch.setattr(backends, "target", lambda: Target("gpu", "none", True))
    q, k, v = (jax.ShapeDtypeStruct((1, n, 4, width), jnp.float32) for n, width in ((64, 16), (69, 16), (69, 32)))

    def both(q, k, v):
        o, pullback = jax.vjp(functools.partial(sliding_window_attention, window=20, backend="pallas"), q, k, v)
        return pullback(o)

    found = [int(flops) for flops in re.findall(r"CostEstimate\(flops=(\d+)", str(jax.make_jaxpr(both)(q, k, v)))]
    pairs = 4 * (1 + 2 + 2 + 2) * 16 * 32
    assert found == [2 * pairs * 48, 2 * pairs * 64, 2 * pairs * 96]
