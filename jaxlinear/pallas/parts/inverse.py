"""Inverses of unit lower triangular matrices inside a TPU kernel: small blocks by elimination, larger ones by doubling.

    inv([[A, 0], [B, C]]) = [[inv(A), 0], [-inv(C) B inv(A), inv(C)]]

Nothing grows beyond the inverse itself, unlike the powers of a series. Diagonal blocks are processed side by side,
``[n, c]``, with the i-th in the i-th n lanes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts.products import dot_terms, terms

BLOCK = 8  # rows of the blocks that are eliminated


def inverses(lower: Sequence[jax.Array], narrow, count: int = 1) -> list[jax.Array]:
    """``(I + L)^-1`` for each L ``[c, c]``, float32 or float64, zero on the diagonal and above, c a power of two from
    ``2 * BLOCK``. The matrices are interleaved, so that none waits for its own last step.

    Blocks of ``2 * BLOCK`` rows are in full precision. If ``narrow`` is bfloat16, each later product cuts one factor to 8
    bits (16 if ``count`` is 2) and the other to 16. This leaves no more error than the inverse has once it is cut to as
    many terms of bfloat16. Otherwise everything is in full precision.
    """
    length = lower[0].shape[0]
    solved = _eliminate([_side_by_side(x, BLOCK, range(length // BLOCK)) for x in lower])
    whole, size = _pairs(lower, solved), 2 * BLOCK
    while size < length:
        whole = _double(lower, whole, size, narrow, count)
        size *= 2
    return whole


def _eliminate(blocks: list[jax.Array]) -> list[jax.Array]:
    """The inverses of blocks side by side: subtracts column after column, times the row that is final by then."""
    row, lane = (lax.broadcasted_iota(jnp.int32, blocks[0].shape, axis) for axis in (0, 1))
    first = _part(lane, BLOCK) * BLOCK
    solved = [(lane - first == row).astype(blocks[0].dtype)] * len(blocks)
    for j in range(BLOCK - 1):
        columns = [_lanes(x, first + j) for x in blocks]
        solved = [x - column * x[j : j + 1] for x, column in zip(solved, columns, strict=True)]
    return solved


def _pairs(lower: Sequence[jax.Array], solved: list[jax.Array]) -> list[jax.Array]:
    """From the inverses of blocks side by side, those of pairs of blocks, ``[c, c]``: one column of a factor times one row
    of the other at a time, in their own dtype."""
    length = lower[0].shape[0]
    lane = lax.broadcasted_iota(jnp.int32, solved[0].shape, 1)
    part, begin = _part(lane, BLOCK), _part(lane, 2 * BLOCK) * (2 * BLOCK)
    blocks = range(length // BLOCK)
    found = []
    for x, y in zip(lower, solved, strict=True):
        # B and what follows from it are on the lanes of the first blocks; the lanes of the second ones are arbitrary.
        b = _side_by_side(x, BLOCK, blocks[1::2], lanes=blocks[::2])
        off = _product(y, begin + BLOCK, _product(b, begin, y))
        rows = []
        for i in blocks:
            own = jnp.where(part == i, y, jnp.zeros_like(y))
            rows.append(own if i % 2 == 0 else jnp.where(part == i - 1, -off, own))
        found.append(jnp.concatenate(rows))
    return found


def _product(x: jax.Array, begin: jax.Array, y: jax.Array) -> jax.Array:
    """Products of blocks of x, whose lanes start at ``begin``, with the blocks of y on the same lanes."""
    found = _lanes(x, begin) * y[:1]
    for j in range(1, BLOCK):
        found = found + _lanes(x, begin + j) * y[j : j + 1]
    return found


def _lanes(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _double(lower: Sequence[jax.Array], inverse: list[jax.Array], size: int, narrow, count: int) -> list[jax.Array]:
    """From the inverses of diagonal blocks of ``size`` rows, those of blocks twice as large."""
    length = lower[0].shape[0]
    part = _part(lax.broadcasted_iota(jnp.int32, (size, length), 1), size)
    firsts, seconds = range(0, length // size, 2), range(1, length // size, 2)
    in_first = (part & 1) == 0
    keep = [part == i for i in firsts]

    def only(i: int, x: jax.Array) -> jax.Array:
        return jnp.where(keep[i // 2], x, jnp.zeros_like(x))

    def rows(x: jax.Array, i: int) -> jax.Array:
        return x[i * size : (i + 1) * size]

    cut = narrow != lower[0].dtype
    reached = []
    for x, y in zip(lower, inverse, strict=True):
        # The lanes of the second blocks, otherwise zero, bring the rest of B to the same inv(A).
        b = jnp.where(in_first, _side_by_side(x, size, seconds, lanes=firsts), jnp.zeros((size, length), x.dtype))
        if cut:
            high, rest = _parts(b)
            b = high + _rolled(rest, size)
        a = jnp.concatenate([rows(y, i) for first in firsts for i in (first, first)])
        reached.append(dot_terms((b.astype(narrow),), terms(a, narrow, count), (1, 0), y.dtype))
    off = []
    for x, y in zip(reached, inverse, strict=True):
        c = jnp.where(in_first, jnp.zeros((size, length), y.dtype), _side_by_side(y, size, seconds))
        if cut:
            high, rest = _parts(x)
            c = c + _rolled(c, length - size)
            pairs = [only(i, part) for i in firsts for part in (rest, high)]
        else:
            pairs = [only(i, part) for i in firsts for part in (jnp.zeros_like(x), x)]
        off.append(dot_terms(terms(c, narrow, count), (jnp.concatenate(pairs).astype(narrow),), (1, 0), y.dtype))
    return [
        jnp.concatenate([z for i in firsts for z in (rows(y, i), rows(y, i + 1) - only(i, x))])
        for y, x in zip(inverse, off, strict=True)
    ]


def _side_by_side(x: jax.Array, size: int, rows: Sequence[int], lanes: Sequence[int] | None = None) -> jax.Array:
    """``[c, c]`` -> ``[size, c]``: those rows of blocks, each on the lanes of the block with its number, or on
    ``lanes``."""
    part = _part(lax.broadcasted_iota(jnp.int32, (size, x.shape[1]), 1), size)
    found = x[rows[0] * size : (rows[0] + 1) * size]
    for i, at in list(zip(rows, rows if lanes is None else lanes, strict=True))[1:]:
        found = jnp.where(part == at, x[i * size : (i + 1) * size], found)
    return found


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A float32 array as the sum of one that bfloat16 can represent and the rest."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    high = lax.bitcast_convert_type(bits & jnp.int32(-(2**16)), x.dtype)
    return high, x - high


def _rolled(x: jax.Array, by: int) -> jax.Array:
    if x.shape[1] % 128 == 0:
        return pltpu.roll(x, by, axis=1)
    return jnp.concatenate([x[:, -by:], x[:, :-by]], axis=1)


def _part(i: jax.Array, size: int) -> jax.Array:
    return lax.div(i, jnp.int32(size))
