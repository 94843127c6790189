"""Sizes of the blocks of softmax attention. Nothing was timed."""

from typing import NamedTuple

from jaxlinear.pallas.parts.target import GPU

# For softmax attention: tokens of a block, and the cycles of all passes for 128 queries and 128 keys in such blocks
# (benchmarks/tpu_attention.py); those in float32 are v5e's.
TPU = {
    "TPU v5 lite": {512: 387, 1024: 321},
    "TPU v5": {512: 347, 1024: 277},
    "TPU v6 lite": {512: 306, 1024: 244},
}
_TPU_ELSEWHERE = {512: 1}
_TPU_FLOAT32 = {256: 1959, 512: 1789}
TPU_KEYS = 512  # of a block, processed at once
# The most channels of a head that fit the 16 MiB of VMEM that JAX's kernels may use on v5e and v5p; and, by bytes per
# number, the most in blocks of so many tokens that are not the smallest.
TPU_CHANNELS = 512
_TPU_WIDEST = {2: {1024: 256}, 4: {512: 192}}


def tpu(kind: str, length: int, window: int, channels: int, size: int) -> int:
    """Tokens of a block of softmax attention, a multiple of 128, chosen so that visiting the blocks that have pairs of
    queries and keys within the window takes the fewest cycles. ``channels``: of a head; ``size``: bytes per number."""
    widest = _TPU_WIDEST[min(size, 4)]
    table = TPU.get(kind, _TPU_ELSEWHERE) if size == 2 else _TPU_FLOAT32

    def cycles(tokens: int) -> int:
        most = -(-(window - 1) // tokens) + 1
        return table[tokens] * tokens**2 * sum(min(n + 1, most) for n in range(-(-length // tokens)))

    smallest = min(table)
    there = [tokens for tokens in table if tokens == smallest or (tokens <= length and channels <= widest[tokens])]
    return min(min(there, key=cycles), -(-length // 128) * 128)


class GPUBlock(NamedTuple):
    queries: int  # of a block, a power of two
    keys: int
    warps: int
    stages: int  # of loads in flight


def gpu(width: int, gpu: GPU | None) -> GPUBlock:
    """For softmax attention with heads of ``width`` channels, a power of two. Not tuned: the largest with which no program
    spills registers, and for whose loads there is room."""
    if width <= 64:
        return GPUBlock(128, 64, 8, 3)
    if gpu is None or (gpu.warpgroups and not gpu.blackwell):
        return GPUBlock(128, 64, 8, 2) if width <= 128 else GPUBlock(64, 32, 8, 2)
    if gpu.warpgroups:  # Blackwell's products keep more of their operands in shared memory
        return GPUBlock(64, 64, 4, 2) if width <= 128 else GPUBlock(64, 64, 8, 1)
    if width <= 128:
        return GPUBlock(64, 64, 8, 2) if gpu.ample else GPUBlock(64, 32, 4, 2)
    return GPUBlock(32, 32, 4, 1)
