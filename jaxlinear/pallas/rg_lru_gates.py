"""The gates of the RG-LRU for TPU, and what each token makes of them: one kernel each way.

W_a and W_x have blocks of, say, 160 channels on their diagonals. As ``[B, T, N, K]``, the activations lie in other tiles
of the memory than as ``[B, T, R]``, and XLA copies them for the products. Here they stay where they are: the channels of a
group of blocks, which fill whole registers, are computed one register after another, each from the registers that its
blocks reach. The other factor, the band of W that a register meets, is cut out beforehand, with zeros between blocks.

Backward, the gates are computed again. With z_r, z_i what the sigmoids are taken of, q = 1 - a^2 and u = w i x,

    dq = du i x / max(2 w, 1 / LARGEST_SLOPE),    dlog a = a (da - 2 a dq),    drate = sum dlog a r
    dz_r = dlog a rate r (1 - r),    dz_i = du w x i (1 - i),    dx = du w i + dz_r W_a^T + dz_i W_x^T,    dW = x^T dz

where w = sqrt(q), but for the first token of a document, whose w is 1 and whose dq is 0. Powers are of 2, which is what a
TPU computes, and in float32 q is a series in log a where a is close to 1.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas import blocks
from jaxlinear.pallas.lanes import LANES, SUBLANES
from jaxlinear.pallas.target import Target

LARGEST_SLOPE = 1000.0  # of the square root: its own grows without bound as a -> 1
_LOG2_E = math.log2(math.e)
_LARGEST_POWER = 60.0
_LEAST = 1e-30  # of what a reciprocal root is taken of
_NEAR = 1 / 24  # -log2 a up to which 1 - a^2 is a series: with a product it would have lost 4 of 24 digits there


def forward(
    x: jax.Array, kernels: jax.Array, vectors: jax.Array, first: jax.Array, *, target: Target
) -> tuple[jax.Array, jax.Array]:
    """a and u ``[B, T, R]`` in the dtype of ``vectors``, the one to compute in.

    Args:
      x: ``[B, T, R]``.
      kernels: ``[2, N, K, K]``, the blocks of W_a and of W_x, multiplied in the dtype of x.
      vectors: ``[3, R]``: b_a, b_x and the rate.
      first: ``[B, T]`` bool, the first tokens of documents.
      target: "tpu" or, to interpret the kernel, another.
    """
    shape = _shape(x, kernels)
    in_time = jax.ShapeDtypeStruct((x.shape[0], shape.padded, shape.width), vectors.dtype)
    bands = _bands(kernels.astype(x.dtype), shape)
    a, u = _call("forward", shape, (x,), bands, vectors, first, (in_time,) * 2, target)
    return a[:, : shape.length], u[:, : shape.length]


def gradient(
    x: jax.Array,
    kernels: jax.Array,
    vectors: jax.Array,
    first: jax.Array,
    d_a: jax.Array,
    d_u: jax.Array,
    *,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of x, ``kernels`` and ``vectors``, from those of ``forward``'s outputs."""
    shape = _shape(x, kernels)
    bands = _bands(jnp.concatenate([kernels, kernels.swapaxes(2, 3)]).astype(x.dtype), shape)
    outputs = (
        jax.ShapeDtypeStruct((x.shape[0], shape.padded, shape.width), x.dtype),
        jax.ShapeDtypeStruct((2, *bands.shape[1:]), vectors.dtype),
        jax.ShapeDtypeStruct((SUBLANES * len(vectors), shape.width), vectors.dtype),
    )
    d_x, d_bands, sums = _call("gradient", shape, (x, d_a, d_u), bands, vectors, first, outputs, target)
    d_vectors = jnp.sum(sums.reshape(len(vectors), SUBLANES, -1), axis=1)
    return d_x[:, : shape.length], _blocks(d_bands, shape).astype(kernels.dtype), d_vectors


class _Tile(NamedTuple):
    """A register's channels in a group, the channels that the blocks of these reach, in whole registers, and the rows of
    the band where the rows of W for the latter are, with a column for each of the former."""

    lanes: slice
    reached: slice
    rows: slice


class _Shape(NamedTuple):
    length: int  # T
    width: int  # R
    block: int  # K
    group: int  # channels of a group of blocks
    tiles: tuple[_Tile, ...]  # of a group
    time: int  # tokens of a block of time

    @property
    def padded(self) -> int:
        """T in whole blocks of time."""
        return self.length + -self.length % self.time

    @property
    def rows(self) -> int:
        """Of a group's bands."""
        return self.tiles[-1].rows.stop


def fits(width: int, block: int, size: int) -> bool:
    """Whether VMEM has room for the blocks of ``block`` channels among ``width``, with numbers of ``size`` bytes."""
    return _time(1, *_tiles(width, block), size) is not None


def _shape(x: jax.Array, kernels: jax.Array) -> _Shape:
    (_, length, width), block = x.shape, kernels.shape[-1]
    group, tiles = _tiles(width, block)
    time = _time(length, group, tiles, x.dtype.itemsize)
    return _Shape(length, width, block, group, tiles, time or LANES)  # where it is interpreted, anything fits


def _tiles(width: int, block: int) -> tuple[int, tuple[_Tile, ...]]:
    """The channels of a group, the fewest whose blocks fill whole registers or else all, and its tiles."""
    group = math.lcm(block, LANES)
    group = width if width % group else group
    tiles: list[_Tile] = []
    for begin in range(0, group, LANES):
        end, row = min(begin + LANES, group), tiles[-1].rows.stop if tiles else 0
        first, last = begin // block, (end - 1) // block
        reached = slice(first * block // LANES * LANES, min(group, -(-(last + 1) * block // LANES) * LANES))
        tiles.append(_Tile(slice(begin, end), reached, slice(row, row + reached.stop - reached.start)))
    return group, tuple(tiles)


def _time(length: int, group: int, tiles: tuple[_Tile, ...], size: int) -> int | None:
    """Tokens of a block, the most of these that divide T in whole registers and that VMEM has room for; None if there is
    none. Arrays that are streamed are there twice."""
    length, bands = length + -length % LANES, tiles[-1].rows.stop * LANES
    wide = max(4, size)
    for time in blocks.RG_LRU_GATES_TPU:
        streamed = 2 * (time * group * 2 * (size + wide) + bands * (4 * size + 2 * wide))
        if length % time == 0 and streamed + time * group * (2 * size + wide) <= blocks.RG_LRU_GATES_BYTES:
            return time
    return None


def _bands(kernels: jax.Array, shape: _Shape) -> jax.Array:
    """``[n, N, K, K]`` as bands ``[n, groups, rows, 128]``."""
    K, parts = shape.block, []
    kernels = kernels.reshape(len(kernels), -1, shape.group // K, K, K)
    for tile in shape.tiles:
        columns = []
        for at, own in _overlaps(tile, K):
            rows = at * K - tile.reached.start, tile.reached.stop - (at + 1) * K
            columns.append(jnp.pad(kernels[:, :, at, :, own], ((0, 0), (0, 0), rows, (0, 0))))
        missing = LANES - (tile.lanes.stop - tile.lanes.start)
        parts.append(jnp.pad(jnp.concatenate(columns, axis=3), ((0, 0),) * 3 + ((0, missing),)))
    return jnp.concatenate(parts, axis=2)


def _blocks(bands: jax.Array, shape: _Shape) -> jax.Array:
    """``[n, N, K, K]``, the blocks of bands ``[n, groups, rows, 128]``."""
    K = shape.block
    found: list[list[jax.Array]] = [[] for _ in range(shape.group // K)]
    for tile in shape.tiles:
        for at, own in _overlaps(tile, K):
            row, lane = tile.rows.start + at * K - tile.reached.start, at * K - tile.lanes.start
            found[at].append(bands[:, :, row : row + K, lane + own.start : lane + own.stop])
    stacked = jnp.stack([jnp.concatenate(columns, axis=3) for columns in found], axis=2)
    return stacked.reshape(len(bands), -1, K, K)


def _overlaps(tile: _Tile, block: int) -> list[tuple[int, slice]]:
    """The group's blocks of which the tile has columns, and which of their columns these are."""
    found = []
    for at in range(tile.lanes.start // block, (tile.lanes.stop - 1) // block + 1):
        before = at * block
        found.append((at, slice(max(0, tile.lanes.start - before), min(block, tile.lanes.stop - before))))
    return found


def _call(
    kind: str,
    shape: _Shape,
    in_time: tuple[jax.Array, ...],
    bands: jax.Array,
    vectors: jax.Array,
    first: jax.Array,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    target: Target,
) -> list[jax.Array]:
    """``in_time``: x and, for the gradient, those of a and u, all ``[B, T, R]``."""
    batch, time = len(first), shape.time
    more = shape.padded - shape.length
    if more:
        in_time = tuple(jnp.pad(y, ((0, 0), (0, more), (0, 0))) for y in in_time)
    marks = jnp.pad(first.astype(jnp.int32), ((0, 0), (0, more)))[:, None]
    by_token = pl.BlockSpec((None, time, shape.group), lambda g, b, t: (b, t, g))

    def by_group(y):  # whole but for its groups
        if y.ndim == 2:
            return pl.BlockSpec((len(y), shape.group), lambda g, b, t: (0, g))
        return pl.BlockSpec((len(y), None, shape.rows, LANES), lambda g, b, t: (0, g, 0, 0))

    wide, is_gradient = vectors.dtype, kind == "gradient"
    scratch: list[Any] = [pltpu.VMEM((time, LANES), jnp.int32)]
    if is_gradient:
        scratch += [pltpu.VMEM((2, time, shape.group), bands.dtype), pltpu.VMEM((time, shape.group), wide)]
    numbers = batch * shape.padded * shape.width
    inputs = [*in_time, bands, vectors, marks]
    arrays: list[Any] = [*inputs, *outputs]
    return pl.pallas_call(
        functools.partial(_gradient if is_gradient else _forward, shape),
        grid=(shape.width // shape.group, batch, shape.padded // time),
        in_specs=[
            *([by_token] * len(in_time)),
            by_group(bands),
            by_group(vectors),
            pl.BlockSpec((None, 1, time), lambda g, b, t: (b, 0, t)),
        ],
        out_specs=[by_token if y.ndim == 3 else by_group(y) for y in outputs],
        out_shape=list(outputs),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary") if is_gradient else ("parallel",) * 3,
            vmem_limit_bytes=blocks.VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=numbers * shape.block * 4 * (3 if is_gradient else 1),
            transcendentals=4 * numbers,
            bytes_accessed=sum(y.size * jnp.dtype(y.dtype).itemsize for y in arrays),
        ),
        name=f"rg_lru_gates_{kind}",
        interpret=target.interpret,
    )(*inputs)


def _forward(shape: _Shape, x, bands, vectors, first, a, u, marks) -> None:
    _fill(marks, first)

    def rows(at):
        is_first = marks[at] > 0
        for tile in shape.tiles:
            found = _gates(x, bands, vectors, at, tile)
            a[at, tile.lanes] = found.a
            u[at, tile.lanes] = found.weight(is_first) * (found.i * found.x)

    _each(shape.time, rows)


def _gradient(shape: _Shape, x, d_a, d_u, bands, vectors, first, d_x, d_bands, sums, marks, d_z, of_x) -> None:
    """``d_z``: those of z_r and z_i; ``of_x``: the part of x's gradient that is not theirs."""

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        d_bands[...] = jnp.zeros_like(d_bands)
        sums[...] = jnp.zeros_like(sums)

    _fill(marks, first)

    def rows(at):
        is_first = marks[at] > 0
        for tile in shape.tiles:
            found = _gates(x, bands, vectors, at, tile)
            r, i, a = found.r, found.i, found.a
            du = d_u[at, tile.lanes]
            ix, d_ix = i * found.x, du * found.weight(is_first)
            of_x[at, tile.lanes] = d_ix * i
            d_q = found.unless_first(is_first, du * ix * found.slope(), 0)
            of_rate = a * (d_a[at, tile.lanes] - 2 * a * d_q) * r
            of_r = of_rate * vectors[2:3, tile.lanes] * (1 - r)
            of_i = d_ix * ix * (1 - i)
            for n, y in enumerate((of_r, of_i, of_rate)):
                eights = jnp.sum(y.reshape(-1, SUBLANES, y.shape[1]), axis=0)
                sums[n * SUBLANES : (n + 1) * SUBLANES, tile.lanes] += eights
            d_z[0, at, tile.lanes], d_z[1, at, tile.lanes] = of_r.astype(d_z.dtype), of_i.astype(d_z.dtype)

    _each(shape.time, rows)
    for tile in shape.tiles:
        total = of_x[:, tile.lanes]
        for n in range(2):
            total = total + _dot(d_z[n, :, tile.reached], _band(bands, 2 + n, tile), 0, total.dtype)
            d_bands[n, tile.rows, : total.shape[1]] += _dot(x[:, tile.reached], d_z[n, :, tile.lanes], 1, total.dtype)
        d_x[:, tile.lanes] = total.astype(d_x.dtype)


class _Gates(NamedTuple):
    """Of some tokens and a tile, in the dtype to compute in."""

    r: jax.Array
    i: jax.Array
    a: jax.Array
    root: jax.Array  # sqrt(1 - a^2)
    inverse: jax.Array  # of the root; not infinite
    x: jax.Array

    def weight(self, is_first: jax.Array) -> jax.Array:
        return self.unless_first(is_first, self.root, 1)

    def slope(self) -> jax.Array:
        """Of the root."""
        return jnp.minimum(self.inverse / 2, LARGEST_SLOPE)

    def unless_first(self, is_first: jax.Array, y: jax.Array, other: float) -> jax.Array:
        """``is_first``: of the tokens, on 128 lanes."""
        return jnp.where(is_first[:, : y.shape[1]], jnp.full_like(y, other), y)


def _gates(x, bands, vectors, at, tile: _Tile) -> _Gates:
    wide = vectors.dtype
    reached = x[at, tile.reached]

    def inverse_gate(n):
        """1 + exp(-z), at most 2^60, where a gate is 1e-18: the reciprocal of two is that of their product."""
        z = _dot(reached, _band(bands, n, tile), 0, wide) + vectors[n : n + 1, tile.lanes]
        return 1 + jnp.exp2(jnp.minimum(z * -_LOG2_E, _LARGEST_POWER))

    for_r, for_i = inverse_gate(0), inverse_gate(1)
    inverse = 1 / (for_r * for_i)
    r, i = inverse * for_i, inverse * for_r
    log2_a = r * (vectors[2:3, tile.lanes] * _LOG2_E)
    a = jnp.exp2(log2_a)
    q = _one_minus_square(log2_a, a)
    of_root = lax.rsqrt(jnp.maximum(q, _LEAST))
    return _Gates(r, i, a, q * of_root, of_root, x[at, tile.lanes].astype(wide))


def _one_minus_square(log2_a: jax.Array, a: jax.Array) -> jax.Array:
    if a.dtype != jnp.float32:
        return -jnp.expm1(2 * math.log(2) * log2_a)  # which is not compiled
    series = jnp.zeros_like(a)
    for n in reversed(range(1, 5)):  # -(exp(y) - 1) for y = 2 log a
        series = log2_a * (series - (2 * math.log(2)) ** n / math.factorial(n))
    return jnp.where(log2_a > -_NEAR, series, 1 - a * a)


def _band(bands, n: int, tile: _Tile) -> jax.Array:
    return bands[n, tile.rows, : tile.lanes.stop - tile.lanes.start]


def _dot(x: jax.Array, y: jax.Array, summed: int, wide) -> jax.Array:
    """``x y`` if ``summed`` is 0, ``x^T y`` if it is 1."""
    # float32 uses the same precision as other products with parameters; for bfloat16 Mosaic accepts only the default.
    precision = None if x.dtype == wide else lax.Precision.DEFAULT
    dimensions = ((1 - summed,), (0,)), ((), ())
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=wide)


def _fill(marks, first) -> None:
    """Each token's mark, on all lanes."""
    for i in range(0, marks.shape[0], LANES):
        marks[i : i + LANES] = jnp.broadcast_to(first[:, i : i + LANES], (LANES, LANES)).T


def _each(time: int, body: Callable[[Any], None]) -> None:
    """``body`` for as many tokens at a time as registers hold; positions have 32 bits even under jax_enable_x64."""
    rows = min(time, blocks.RG_LRU_GATES_ROWS)

    def step(i, carry):
        body(pl.ds(pl.multiple_of(i.astype(jnp.int32) * rows, rows), rows))
        return carry

    lax.fori_loop(0, time // rows, step, jnp.int32(0))
