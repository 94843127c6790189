"""The delta rule's kernels: blocks of heads and what they take of VMEM; keys at the limits, inverses in bfloat16, and
negative eigenvalues."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxlinear.ops import delta_rule
from jaxlinear.pallas.delta_rule import blocks
from jaxlinear.pallas.parts import inverse
from tests import numerics
from tests.ops import test_delta_rule as operation
from tests.pallas import kernel_cases
from tests.pallas.kernel_cases import ids_of


@pytest.mark.slow(but=["512-of_blocks1"])
@pytest.mark.parametrize("lanes, of_blocks", [(128, [2, 2]), (512, [3, 2])])
def test_blocks_of_some_heads(monkeypatch, lanes, of_blocks):
    """Of three heads, the last block may have one; the forward pass takes more at once than the gradient."""
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", blocks.Block(32, 32, lanes))
    assert [blocks.heads_of("", 3, 64, 64, forward) for forward in (True, False)] == of_blocks
    check_heads(3, lanes, "scalar")


@pytest.mark.slow(but=["3-scalar"])
@pytest.mark.parametrize("together, decay", [(1, "channel"), (3, "scalar")])
def test_a_block_of_heads_in_groups(monkeypatch, together, decay):
    """Two groups share a register."""
    monkeypatch.setattr(blocks, "_TPU_ELSEWHERE", blocks.Block(32, 32, 1024))
    monkeypatch.setattr(blocks.Heads, "together", lambda _: together)
    assert blocks.heads_of("", 5, 64, 64) == 4
    check_heads(5, together, decay)


def check_heads(heads, seed, decay):
    inputs = kernel_cases.draw("delta_rule", np.random.default_rng(seed), decay, 50, heads, 64, 64)
    kernel_cases.assert_as_the_recurrence("delta_rule", inputs, "float32")


def test_negative_eigenvalues_on_a_simulated_tpu(small_blocks, use):
    use("simulated")
    kernel_cases.check("delta_rule", "short", "bfloat16", negative_eigenvalues=True)


# Keys at the limits


def assert_right_in_float32(inputs, run, tolerance=1e-5):
    random = np.random.default_rng(3)
    cotangents = numerics.normal(random, *inputs[2].shape), numerics.normal(random, *inputs[5].shape)
    expected = numerics.run(operation.reference(False), inputs, cotangents, dtype="float64")
    numerics.assert_close(numerics.run(run, inputs, cotangents, dtype="float32"), expected, tolerance)


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_equal_keys_and_reflections(small_blocks, kind):
    q, k, *rest = operation.at_the_limits(kind, lambda random, shape: -random.uniform(0, 0.01, shape), 2.0)
    k = np.zeros_like(k)
    k[..., 1] = 1
    assert_right_in_float32((q, k, *rest), kernel_cases.kernel("delta_rule"), tolerance=5e-5)


def test_hard_keys(small_blocks):
    """All keys equal, almost equal, or zero."""
    q, k, v, beta, _, state = operation.at_the_limits("none", beta=1.0)
    near = k[:, :1] + 1e-3 * k
    near, run = near / np.linalg.norm(near, axis=-1, keepdims=True), kernel_cases.kernel("delta_rule")
    for keys in (k[:, :1] + np.zeros_like(k), near.astype(np.float32).astype(np.float64), 0 * k):
        assert_right_in_float32((q, keys, v, beta, None, state), run)


@pytest.mark.parametrize("target, chunk", [("tpu", 128), ("gpu", 64)])
def test_keys_alike_in_bfloat16(small_blocks, target, chunk, use):
    """The entries of the inverse cancel. With it, or on GPU all factors of its products, in bfloat16, the error would be 3%
    on TPU, 1.5% of the outputs on GPU."""
    use(target)
    random = np.random.default_rng(3)
    common, own = (operation.unit(random.standard_normal((1, length, 1, 16))) for length in (1, 128))
    keys = operation.unit(0.9 * common + np.sqrt(1 - 0.9**2) * own)
    q, v = (numerics.normal(random, *keys.shape) for _ in range(2))
    inputs = q, keys, v, numerics.uniform(random, 1, 128, 1, high=1.9)
    by_loop = numerics.jit(functools.partial(delta_rule, backend="recurrent"))
    expected = numerics.wide(numerics.run(by_loop, *inputs, dtype="float64"))
    run = numerics.jit(functools.partial(delta_rule, chunk_size=chunk, backend="pallas"))
    found = numerics.wide(numerics.run(run, *inputs, dtype="bfloat16"))
    numerics.assert_close(found, expected, 2e-2)
    if target == "gpu":
        assert np.linalg.norm(found[0] - expected[0]) < 1e-2 * np.linalg.norm(expected[0])


def inverse_of(lower, count):
    def kernel(x, y):
        y[...] = inverse.inverses([x[...]], jnp.bfloat16, count)[0]

    shape = jax.ShapeDtypeStruct(lower.shape, jnp.float32)
    return np.asarray(pl.pallas_call(kernel, out_shape=shape, interpret=True)(lower))


def test_inverses_to_16_bits_of_unlike_blocks():
    """Of the blocks of 16 rows only the last differs from the identity, so between the others the inverse has the entries
    of -``lower`` itself, which are a factor in two bfloat16 terms and so keep 16 bits."""
    lower = np.tril(np.random.default_rng(0).standard_normal((128, 128)), -1).astype(np.float32)
    block = np.arange(128) // 16
    lower[(block[:, None] == block) & (block < 7)] = 0
    lower[block[:, None] > block + 1 - block % 2] = 0  # one step of doubling
    found, last_counts = inverse_of(lower, 1), slice(96)
    numerics.assert_close(found[last_counts, last_counts], (np.eye(128) - lower)[last_counts, last_counts], 2**-16)


def test_inverses_in_two_terms():
    """For keys that are alike and beta = 2: numbers from -2 to 2, from sums of many such numbers."""
    random = np.random.default_rng(0)
    keys = operation.unit(random.standard_normal((1, 16)) + 0.1 * random.standard_normal((128, 16)))
    lower = np.tril(2 * keys @ keys.T, -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(128) + lower)
    numerics.assert_close(inverse_of(lower, 2), expected, 5e-3)
    assert np.max(np.abs(inverse_of(lower, 1) - expected)) > 0.05


def alike(keys, beta, decay, width):
    """Inputs of the delta rule, and cotangents: one key, varied per token as ``keys`` says; beta is 2, from 1.9 to 2, or
    alternately 2 and 0.1."""
    random, length = np.random.default_rng(1), 150
    q, v, own = (numerics.normal(random, 1, length, 1, width) for _ in range(3))
    turns = (-1.0) ** np.arange(length)[None, :, None]
    one = random.standard_normal((1, 1, 1, width)) * (turns[..., None] if keys == "turned" else 1)
    k, near = (
        operation.unit(one + {"near": 0.01}.get(keys, 0) * own),
        numerics.uniform(random, *turns.shape, low=1.9, high=2),
    )
    betas = {"2": 2 + 0 * turns, "1.9": near, "turns": 1.05 + 0.95 * turns}
    shape = {"none": None, "scalar": turns.shape, "channel": q.shape}[decay]
    log_decay = None if shape is None else numerics.representable(-random.uniform(0, 0.02, shape))
    state, d_o, d_state = (numerics.normal(random, *s) for s in ((1, 1, width, width), v.shape, (1, 1, width, width)))
    return (q / 8, k, v, betas[beta], log_decay, state), (d_o, d_state)


def check_alike(keys, beta, decay, packed, chunk=None, width=32):
    """In bfloat16, with beta and the decays in float32: no output or gradient is much further off than with ``chunked``,
    which solves in float32."""
    inputs, cotangents = alike(keys, beta, decay, width)
    run = functools.partial(kernel_cases.kernel, "delta_rule", segment_ids=ids_of(5, 120, 25) if packed else None)
    expected = numerics.wide(numerics.run(run(backend="recurrent"), inputs, cotangents, dtype="float64"))
    narrow = *(jnp.asarray(x, jnp.bfloat16) for x in inputs[:3]), *numerics.cast(inputs[3:], "float32")

    def errors(run):
        pairs = zip(*map(jax.tree.leaves, (numerics.wide(run(narrow, cotangents)), expected)), strict=True)
        return np.array([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs])

    in_chunks, found = errors(run(backend="chunked")), errors(run(chunk_size=chunk, negative_eigenvalues=True))
    assert (found < 2 * in_chunks + 0.005).all(), (found.round(3), in_chunks.round(3))


# By channel on TPU it takes half a minute to compile; on GPU it is always taken, and the others are not.
@pytest.mark.slow(cases=["turned-2-channel-False-tpu", "same-2-none-False-gpu", "near-1.9-scalar-True-gpu"])
@pytest.mark.parametrize(
    "keys, beta, decay, packed, target",
    [
        *(("same", "2", "none", False, target) for target in ("tpu", "gpu")),
        *(("near", "1.9", "scalar", True, target) for target in ("tpu", "gpu")),
        *(("turned", "2", "channel", False, target) for target in ("tpu", "gpu")),
        ("near", "turns", "none", True, "tpu"),
    ],
)
def test_negative_eigenvalues(small_blocks, keys, beta, decay, packed, target, use):
    use(target)
    check_alike(keys, beta, decay, packed, chunk=128 if target == "tpu" else None)


# Blocks


# Heads of a block, K, V, bytes per number, whether decays are by channel; MiB that the gradient compiled for v5e takes with
# B = 8, T = 4,000, documents and all heads at once; and how many fit at once.
VMEM = [
    ((8, 128, 128, 4, True), 56.1, 8),
    ((4, 256, 256, 4, True), 61.4, 4),
    ((13, 24, 24, 4, True), 63.5, 7),
    ((16, 16, 200, 4, True), 122.5, 6),
    ((9, 200, 400, 2, True), 73.5, 5),
    ((8, 80, 80, 2, True), 23.5, 8),
    ((5, 200, 200, 4, False), 40.0, 5),
    ((16, 16, 200, 4, False), 77.8, 8),
    ((9, 200, 400, 2, False), 43.9, 9),
    ((8, 64, 64, 2, False), 10.4, 8),
]


# The same for the forward pass, where decays not by channel were by head or none.
VMEM_FORWARD = [
    ((16, 248, 248, 4, False), 65.5, 8),
    ((16, 248, 496, 2, False), 61.9, 6),
    ((16, 168, 256, 4, True), 56.2, 8),
    ((16, 200, 208, 4, False), 52.4, 16),
    ((8, 256, 256, 4, True), 30.8, 8),
]


@pytest.mark.parametrize(
    "sizes, measured, together, is_gradient", [*((*x, True) for x in VMEM), *((*x, False) for x in VMEM_FORWARD)]
)
def test_what_heads_take_of_vmem(sizes, measured, together, is_gradient):
    block = blocks.Heads(*sizes, is_gradient=is_gradient)
    assert 1 <= block.vmem(block.heads) / (measured * 2**20) < 1.35
    assert block.together() == together


@pytest.mark.parametrize("heads, keys, values", [(16, 64, 64), (6, 128, 256), (5, 96, 192), (40, 16, 16), (1, 100, 20)])
def test_blocks_of_heads(heads, keys, values):
    """Blocks fill whole lane registers, or have all heads, and never too many."""
    for kind, forward in itertools.product(("", "TPU v5 lite"), (False, True)):
        count = blocks.heads_of(kind, heads, keys, values, forward)
        assert count == heads or count * keys % 128 == count * values % 128 == 0
        assert count <= blocks.HEADS
