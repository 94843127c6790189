"""Sizes of the blocks of the selective scan. Nothing was timed."""

from typing import NamedTuple

from jaxlinear.pallas.parts.memory import VMEM_BYTES

# On TPU: tokens of a group, processed in one iteration, a multiple of 8; and the most state numbers per token in a block of
# channels, and the most in the columns of a block of time, except that neither block has fewer than 128 or more than 512
# channels or tokens.
ROWS = 32
_NUMBERS = 8192


def tpu(length: int, states: int, width: int) -> tuple[int, int]:
    """Tokens and channels of a block of the selective scan, for N = ``states``. ``width``: all channels, a multiple of 128,
    which are divided equally among the blocks."""
    most = _most(states)
    tiles = width // 128
    time = min(most, -(-length // 128))
    return 128 * time, 128 * next(n for n in range(min(tiles, most), 0, -1) if tiles % n == 0)


def _most(states: int) -> int:
    """Times 128."""
    return max(1, min(4, _NUMBERS // states // 128))


def tpu_channels(states: int) -> int:
    """How many channels VMEM has room for. Each needs, twice, the state before and after and the gradient of A, and A once;
    the largest block's memory is added, including spilled registers. Compiled programs took as much where two rows of a
    batch overlap, and less with one row."""
    states += -states % 8
    most = 128 * _most(states)
    columns, again, before, spilled = 2 * most * 128, 129 * most, 2 * most // 128 * most, 70 * most
    numbers = states * (columns + again + before + 8 * most + spilled) + (3 * 128 + 10 * most) * most
    return max(0, VMEM_BYTES // 4 - numbers) // (7 * states) // 128 * 128


class GPUBlock(NamedTuple):
    channels: int  # of a lane of a warp; 8 lanes divide the channels
    numbers: int  # of each channel's state, in a lane; 4 lanes divide them
    rows: int  # tokens processed at once
    kept: int  # tokens between the states that the forward pass keeps, a multiple of ``rows``
    again: tuple[str, ...]  # fields of a token that are loaded again, for lack of registers


def gpu(states: int) -> GPUBlock:
    """``states``: N. The forward pass keeps about two numbers per token and channel. With another number of channels per
    lane, or with fewer rows, a token takes more instructions, as counted in the PTX; with more rows, registers spill. No
    GPU has timed them."""
    rounded = max(4, 1 << (states - 1).bit_length())
    again = ("dt", "x", "C") if rounded >= 16 else ("dt",)
    return GPUBlock(4, min(4, rounded // 4), 4, max(8, rounded // 2), again)
