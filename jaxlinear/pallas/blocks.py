"""Block sizes of the kernels, by JAX's name of the device. Those for TPU are the best of ``benchmarks/tpu_kernels.py
--tune``, by static schedules: nothing was timed."""

from typing import NamedTuple


class ScanBlock(NamedTuple):
    time: int  # steps of a block, a multiple of 128
    width: int  # channels of a block, a multiple of 128; half as many where numbers are complex
    rows: int  # steps taken in an iteration, a multiple of 16


SCAN_TPU = {
    "TPU v5 lite": ScanBlock(512, 512, 32),
    "TPU v5": ScanBlock(512, 512, 32),
    "TPU v6 lite": ScanBlock(512, 512, 32),
}
_SCAN_TPU_ELSEWHERE = ScanBlock(256, 512, 32)

# Registers of 32 bits that a thread may hold of time steps that are loaded, of 255; the next as many are on their way.
_SCAN_GPU_REGISTERS = 72
SCAN_GPU_CHANNELS = 32  # of a program: a warp, a thread a channel


def scan_tpu(kind: str, length: int, width: int, parts: int) -> ScanBlock:
    """The block of the scan ``[length, width]``; ``parts``: 2 of complex numbers."""
    time, lanes, rows = SCAN_TPU.get(kind, _SCAN_TPU_ELSEWHERE)
    lanes = max(128, lanes // parts)
    time = min(time, -(-length // 128) * 128)
    if width <= lanes:
        return ScanBlock(time, width, rows)
    tiles, most = -(-width // 128), lanes // 128
    blocks = -(-tiles // most)  # as few blocks as can be, as even as can be
    return ScanBlock(time, -(-tiles // blocks) * 128, rows)


def scan_gpu_rows(arrays: int) -> int:
    """Time steps that a thread loads at once, of so many arrays: a power of two."""
    return 1 << ((_SCAN_GPU_REGISTERS // arrays).bit_length() - 1)
