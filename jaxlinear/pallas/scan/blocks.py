"""Sizes of the blocks of the scan, by JAX's name for the device. Those for TPU are the best of
``benchmarks/tpu_kernels.py --tune``, by static schedules; nothing was timed."""

from typing import NamedTuple


class Block(NamedTuple):
    time: int  # steps of a block, a multiple of 128
    width: int  # channels of a block, a multiple of 128; half as many for complex numbers
    rows: int  # steps per iteration, a multiple of 16


TPU = {
    "TPU v5 lite": Block(512, 512, 32),
    "TPU v5": Block(512, 512, 32),
    "TPU v6 lite": Block(512, 512, 32),
    "TPU7x": Block(512, 512, 32),
}
_TPU_ELSEWHERE = Block(256, 512, 32)

# 32-bit registers (of 255) that a thread may use for loaded time steps; equally many are in flight for the next ones.
_GPU_REGISTERS = 72
GPU_CHANNELS = 32  # of a program: one warp, one thread per channel


def tpu(kind: str, length: int, width: int, parts: int) -> Block:
    """The block of the scan ``[length, width]``; ``parts``: 2 for complex numbers."""
    time, lanes, rows = TPU.get(kind, _TPU_ELSEWHERE)
    lanes = max(128, lanes // parts)
    time = min(time, -(-length // 128) * 128)
    if width <= lanes:
        return Block(time, width, rows)
    tiles, most = -(-width // 128), lanes // 128
    blocks = -(-tiles // most)  # as few blocks as possible, as even as possible
    return Block(time, -(-tiles // blocks) * 128, rows)


def gpu_rows(arrays: int) -> int:
    """Time steps that a thread loads at once from ``arrays`` arrays: a power of two."""
    return 1 << ((_GPU_REGISTERS // arrays).bit_length() - 1)
