"""The blocks of W_a and W_x as the RG-LRU's kernels for TPU take them.

W_a and W_x have blocks of, say, 160 channels on their diagonals. As ``[B, T, N, K]``, the activations lie in other tiles
of the memory than as ``[B, T, R]``, and XLA copies them for the products. Here they stay where they are: the channels of a
group of blocks, which fill whole registers, are computed one register after another, each from the registers that its
blocks reach. The other factor, the band of W that a register meets, is cut out beforehand, with zeros between blocks.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.pallas.parts.lanes import LANES
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import blocks


class Tile(NamedTuple):
    """A register's channels in a group, the channels that the blocks of these reach, in whole registers, and the rows of
    the band where the rows of W for the latter are, with a column for each of the former."""

    lanes: slice
    reached: slice
    rows: slice

    @property
    def width(self) -> int:
        return self.lanes.stop - self.lanes.start


class Shape(NamedTuple):
    length: int  # T
    width: int  # R
    block: int  # K
    group: int  # channels of a group of blocks
    tiles: tuple[Tile, ...]  # of a group
    time: int  # tokens of a block of time

    @property
    def padded(self) -> int:
        """T in whole blocks of time."""
        return self.length + -self.length % self.time

    @property
    def rows(self) -> int:
        """Of a group's bands."""
        return self.tiles[-1].rows.stop


class Bytes(NamedTuple):
    """What a kernel has in VMEM: bytes for each channel of each token of a block, and for each number of a band."""

    tokens: int
    bands: int


def shape_of(x: jax.Array, kernels: jax.Array, needed: Bytes, target: Target) -> Shape:
    (_, length, width), block = x.shape, kernels.shape[-1]
    group, tiles, time = _chosen(length, width, block, needed, blocks.CORES.get(target.kind, 1))
    return Shape(length, width, block, group, tiles, time or LANES)  # where it is interpreted, anything fits


def fit(width: int, block: int, needed: Bytes) -> bool:
    """Whether VMEM has room for the blocks of ``block`` channels among ``width``."""
    return _chosen(1, width, block, needed, 1)[2] is not None


def _chosen(length: int, width: int, block: int, needed: Bytes, cores: int) -> tuple[int, tuple[Tile, ...], int | None]:
    """The channels of a group, its tiles, and the tokens of a block of time, or None if VMEM has room for none. Groups for
    all cores come first, then the most tokens, then the widest group."""
    found = []
    for group in _groups(width, block):
        tiles = _tiles(group, block)
        found.append((group, tiles, _time(length, group, tiles, needed)))
    return max(found, key=lambda x: (x[2] is not None, min(width // x[0], cores), x[2] or 0, x[0]))


def _groups(width: int, block: int) -> list[int]:
    """The fewest channels whose blocks fill whole registers, or else all; and multiples of these. More registers side by
    side leave fewer waits in the scan."""
    least = math.lcm(block, LANES)
    least = width if width % least else least
    most = max(least, 2 * blocks.CHANNELS - 1)
    return [group for group in range(least, most + 1, least) if width % group == 0]


def _tiles(group: int, block: int) -> tuple[Tile, ...]:
    tiles: list[Tile] = []
    for begin in range(0, group, LANES):
        end, row = min(begin + LANES, group), tiles[-1].rows.stop if tiles else 0
        first, last = begin // block, (end - 1) // block
        reached = slice(first * block // LANES * LANES, min(group, -(-(last + 1) * block // LANES) * LANES))
        tiles.append(Tile(slice(begin, end), reached, slice(row, row + reached.stop - reached.start)))
    return tuple(tiles)


def _time(length: int, group: int, tiles: tuple[Tile, ...], needed: Bytes) -> int | None:
    """Tokens of a block, the most of these that divide T in whole registers and that VMEM has room for; None if there is
    none."""
    length, bands = length + -length % LANES, tiles[-1].rows.stop * LANES
    for time in blocks.TIME:
        if length % time == 0 and time * group * needed.tokens + bands * needed.bands <= blocks.BYTES:
            return time
    return None


def bands_of(kernels: jax.Array, shape: Shape) -> jax.Array:
    """``[n, N, K, K]`` as bands ``[n, groups, rows, 128]``."""
    K, parts = shape.block, []
    kernels = kernels.reshape(len(kernels), -1, shape.group // K, K, K)
    for tile in shape.tiles:
        columns = []
        for at, own in _overlaps(tile, K):
            rows = at * K - tile.reached.start, tile.reached.stop - (at + 1) * K
            columns.append(jnp.pad(kernels[:, :, at, :, own], ((0, 0), (0, 0), rows, (0, 0))))
        missing = ((0, 0),) * 3 + ((0, LANES - tile.width),)
        parts.append(jnp.pad(jnp.concatenate(columns, axis=3), missing))
    return jnp.concatenate(parts, axis=2)


def blocks_of(bands: jax.Array, shape: Shape) -> jax.Array:
    """``[n, N, K, K]``, the blocks of bands ``[n, groups, rows, 128]``."""
    K = shape.block
    found: list[list[jax.Array]] = [[] for _ in range(shape.group // K)]
    for tile in shape.tiles:
        for at, own in _overlaps(tile, K):
            row, lane = tile.rows.start + at * K - tile.reached.start, at * K - tile.lanes.start
            found[at].append(bands[:, :, row : row + K, lane + own.start : lane + own.stop])
    stacked = jnp.stack([jnp.concatenate(columns, axis=3) for columns in found], axis=2)
    return stacked.reshape(len(bands), -1, K, K)


def _overlaps(tile: Tile, block: int) -> list[tuple[int, slice]]:
    """The group's blocks of which the tile has columns, and which of their columns these are."""
    found = []
    for at in range(tile.lanes.start // block, (tile.lanes.stop - 1) // block + 1):
        before = at * block
        found.append((at, slice(max(0, tile.lanes.start - before), min(block, tile.lanes.stop - before))))
    return found
