"""Decays of key channels within a chunk, inside kernels, under the rules of ``chunk_decays``."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.chunk_decays import (
    GROUP,
    finite,
    in_groups,
    masked,
    pairs,
    places,
    times,
)
from jaxlinear.pallas.products import dot, dot_terms, terms

Groups: TypeAlias = Sequence[jax.Array | None]  # for each group ``[1, K]``, None for 1
ROW, COLUMN = 0, 1  # the index in pairs: since or before, until or after


class ByLevels:
    """A decay of each key channel: ``since_start``, ``until_end`` ``[c, K]`` and ``whole`` ``[1, K]`` as in ``ops.decay``.

    Two tokens of different groups meet at the middle of the smallest of the chunk's halves, quarters, ... that has both:
        exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j),   i > r >= j,
    so both factors are at most 1. At each such level a token is on one side: a row, decayed since the middle, or a column,
    decayed until it. It has one factor there: its own, since or until a position in its group, times the group's, between
    that and the middle. Subclasses define the groups and the products within each.
    """

    by_channel = True

    def __init__(self, own: tuple[jax.Array, jax.Array], ends: tuple[Groups, Groups], wholes: Groups):
        """``own`` ``[c, K]``: a token's decays as a row, since a position in its group, and as a column, until one.
        ``ends``: for each group the decays from its start to that position, and from there to its end. ``wholes``: its
        total decay."""
        levels, outside, whole = _between(wholes)
        assert whole is not None
        self.whole = whole
        self._own = [_cut(x, len(wholes)) for x in own]
        self._outside = [[times(x, y) for x, y in zip(*z, strict=True)] for z in zip(ends, outside, strict=True)]
        self._levels = [[times(ends[_side(g, n)][g], x) for g, x in enumerate(level)] for n, level in enumerate(levels)]
        self._pairs = pairs(own[0].shape[0])

    @property
    def since_start(self) -> jax.Array:
        return self._until_outside(ROW)

    @property
    def until_end(self) -> jax.Array:
        return self._until_outside(COLUMN)

    def from_start(self, x: jax.Array, factor: jax.Array | None) -> jax.Array:
        """``factor * since_start * x``, in the dtype of x, computed from what ``pairwise`` has for these rows."""
        return self._decayed(x, ROW, factor)

    def to_end(self, x: jax.Array, factor: jax.Array | None) -> jax.Array:
        """``factor * until_end * x``, in the dtype of x, computed from what ``pairwise`` has for these columns."""
        return self._decayed(x, COLUMN, factor)

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        """``A_ij = sum_k r_ik columns_jk exp(G_ik - G_jk)`` for i >= j, else 0, for each r of ``rows`` ``[c, K]``.
        Where r is ``columns`` itself, as in the delta rule, entries with i = j are unspecified; so are their gradients."""
        i, j = self._pairs
        apart = i ^ j
        products = self._near_products(rows, columns, apart, wide)
        for n in range(len(self._levels)):
            size = self._size << n
            second = jnp.concatenate([_halves(self._at_level(n, r, ROW), size)[1] for r in rows])
            first = self._at_level(n, columns, COLUMN)
            crossing = dot(second.astype(columns.dtype), first.astype(columns.dtype), (1, 1), wide)
            far = _halves(apart, size)[1] >= size
            for m, new in enumerate(_cut(crossing, len(rows))):
                above, own = _halves(products[m], size)
                products[m] = _joined(above, jnp.where(far, new, own), size)
        return [masked(i >= j, x) for x in products]

    def pairwise_gradient(
        self, rows, columns, d_products, wide, count=1
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """From the gradients of ``pairwise``'s products, those for the last of ``rows`` in ``count`` terms: more than one
        where the gradients of the decays are small differences of their sums.

        Returns:
          the gradients of ``rows`` and of ``columns``; and ``sum r dr - columns dcolumns`` ``[c, K]``, without the products
          of a token with itself: the gradient of the log decays is its ``suffix_sums``.
        """
        i, j = self._pairs
        apart = i ^ j
        d_rows: list[jax.Array] = []
        d_columns: Any = 0.0
        for r, d, in_terms in zip(rows, d_products, of_last(count, rows), strict=True):
            # For both tokens of a pair at once: each product has one of them as a row and the other as a column.
            d = masked(i > j, d)
            both = jnp.where(i > j, d, d.T)
            d_row, d_column = self._near_gradients(r, columns, (d, both), apart, wide, in_terms)
            d_columns = d_columns + d_column
            for n in range(len(self._levels)):
                size = self._size << n
                (first, _), (_, second) = (
                    _halves(self._at_level(n, x, side), size) for x, side in ((columns, COLUMN), (r, ROW))
                )
                x = _joined(first, second, size).astype(columns.dtype)
                crossing = terms(masked((apart >= size) & (apart < 2 * size), both), x.dtype, in_terms)
                of_columns, of_row = _halves(self._factors(n) * dot_terms(crossing, (x,), (1, 0), wide), size)
                first, second = _halves(d_row, size)
                d_row = _joined(first, second + of_row, size)
                first, second = _halves(d_columns, size)
                d_columns = _joined(first + of_columns, second, size)
            d_rows.append(d_row)
        return with_same(self._pairs, rows, columns, d_products, d_rows, d_columns)

    def _near_products(
        self, rows: tuple[jax.Array, ...], columns: jax.Array, apart: jax.Array, wide
    ) -> list[jax.Array]:
        """``pairwise`` for pairs within a group, and arbitrary values for others; ``apart`` is i ^ j for tokens i and j."""
        raise NotImplementedError

    def _near_gradients(
        self,
        row: jax.Array,
        columns: jax.Array,
        d_products: tuple[jax.Array, jax.Array],
        apart: jax.Array,
        wide,
        count: int,
    ) -> tuple[jax.Array, jax.Array]:
        """The gradients of ``row`` and ``columns`` for pairs within a group, from ``d_products``, in ``count`` terms:
        where i > j alone, and the same for (i, j) and (j, i)."""
        raise NotImplementedError

    @property
    def _size(self) -> int:
        """Number of tokens in a group."""
        return self._own[ROW][0].shape[0]

    def _until_outside(self, side: int) -> jax.Array:
        return jnp.concatenate([times(x, y) for x, y in zip(self._outside[side], self._own[side], strict=True)])

    def _decayed(self, x: jax.Array, side: int, factor: jax.Array | None) -> jax.Array:
        own = self._times_own(x, side)
        wide = jnp.concatenate([times(y, z) for y, z in zip(self._outside[side], own, strict=True)])
        return times(factor, wide).astype(x.dtype)

    def _times_own(self, x: jax.Array, side: int) -> list[jax.Array]:
        own = self._own[side]
        return [y * z.astype(y.dtype) for y, z in zip(own, _cut(x, len(own)), strict=True)]

    def _at_level(self, n: int, x: jax.Array, side: int) -> jax.Array:
        """x as rows or as columns, wide, with zeros for the tokens on the other side."""
        return jnp.concatenate(
            [
                times(factor, y) if side == _side(g, n) else jnp.zeros_like(y)
                for g, (factor, y) in enumerate(zip(self._levels[n], self._times_own(x, side), strict=True))
            ]
        )

    def _factors(self, n: int) -> jax.Array:
        """What a token is scaled by at a level, ``[c, K]``."""
        return jnp.concatenate([times(x, self._own[_side(g, n)][g]) for g, x in enumerate(self._levels[n])])


class ByChannel(ByLevels):
    """Any decay: groups are registers, with levels for their own halves, quarters and eighths."""

    def __init__(self, log_decay: jax.Array):
        groups = in_groups(to_base_2(finite(log_decay)))
        self._row = places(groups)
        near, seen, left = _near(groups, self._row)
        self._near = [jnp.exp2(x) for x in near]
        own = jnp.exp2(seen).reshape(log_decay.shape), jnp.exp2(left).reshape(log_decay.shape)
        none = [None] * len(groups)
        super().__init__(own, (none, none), [jnp.exp2(x[-1:]) for x in seen])

    def _near_products(self, rows, columns, apart, wide) -> list[jax.Array]:
        products = []
        for row in rows:
            product = jnp.zeros(apart.shape, wide) if row is columns else dot(row, columns, (1, 1), wide)
            for size, x, _ in self._near_scaled(row, columns):
                product = jnp.where(apart >= size, dot(x, x, (1, 1), wide), product)
            products.append(product)
        return products

    def _near_gradients(self, row, columns, d_products, apart, wide, count) -> tuple[jax.Array, jax.Array]:
        d_row: Any = 0.0
        d_columns: Any = 0.0
        for size, x, factor in self._near_scaled(row, columns):
            crossing = (apart >= size) & (apart < 2 * size)
            d = terms(masked(crossing, d_products[1]), x.dtype, count)
            d_x = in_groups(factor * dot_terms(d, (x,), (1, 0), wide))
            in_second = (self._row & size) != 0
            d_row = d_row + masked(in_second, d_x).reshape(x.shape)
            d_columns = d_columns + masked(~in_second, d_x).reshape(x.shape)
        return d_row, d_columns

    def _near_scaled(self, row: jax.Array, columns: jax.Array):
        """By level: the tokens of half of its parts as rows and those of the others as columns, in one array ``[c, K]`` of
        their dtype; and the factors in it."""
        shape, dtype, wide = row.shape, row.dtype, self._near[0].dtype
        row, columns = in_groups(row.astype(wide)), in_groups(columns.astype(wide))
        for n, factor in enumerate(self._near):
            x = jnp.where((self._row & (1 << n)) != 0, row, columns) * factor
            yield 1 << n, x.reshape(shape).astype(dtype), factor.reshape(shape)


def of_last(count: int, rows) -> list[int]:
    """For each of ``rows``: ``count`` for the last, 1 for the others."""
    return [1] * (len(rows) - 1) + [count]


def with_same(pairs, rows, columns, d_products, d_rows, d_columns):
    """Adds the products of a token with itself, which have no decay, to the gradients of the others; except
    to those of ``columns`` as a row."""
    i, j = pairs
    wide_columns = columns.astype(d_columns.dtype)
    sums, every = -wide_columns * d_columns, []
    for r, d, d_row in zip(rows, d_products, d_rows, strict=True):
        wide_row = r.astype(d.dtype)
        sums = sums + wide_row * d_row
        if r is not columns:
            same = jnp.sum(masked(i == j, d), axis=1, keepdims=True)
            d_row, d_columns = d_row + same * wide_columns, d_columns + same * wide_row
        every.append(d_row)
    return every, d_columns, sums


def to_base_2(log_decay: jax.Array) -> jax.Array:
    """The argument with which ``exp2``, the hardware's, gives the exponential of ``log_decay``."""
    return log_decay * jnp.asarray(1 / math.log(2), log_decay.dtype)


def _near(log_decay: jax.Array, row: jax.Array):
    """In groups of 8 tokens: a token's log decay since or until the middle of its 2, 4 and 8; and since their start and
    until their end."""
    none = jnp.zeros_like(log_decay)
    odd, second, later = ((row & size) != 0 for size in (1, 2, 4))
    before, after = (pltpu.roll(log_decay, by, axis=1) for by in (1, GROUP - 1))
    levels = [jnp.where(odd, log_decay, none)]
    seen, left = jnp.where(odd, log_decay + before, log_decay), jnp.where(odd, none, after)
    levels.append(jnp.where(second, seen, left))
    of_first, of_second = (jnp.where(later, seen[:, n + 4 : n + 5], seen[:, n : n + 1]) for n in (1, 3))
    seen, left = seen + jnp.where(second, of_first, none), left + jnp.where(second, none, of_second)
    levels.append(jnp.where(later, seen, left))
    of_first, of_second = seen[:, 3:4], seen[:, 7:8]
    seen, left = seen + jnp.where(later, of_first, none), left + jnp.where(later, none, of_second)
    return levels, seen, left


def _between(wholes: Groups) -> tuple[list[Groups], tuple[Groups, Groups], jax.Array | None]:
    """From the decays of groups: by level, those between each group and the middle; those before and those after each
    group; and that of all."""
    count, n = len(wholes), 0
    before: Groups = [None] * count
    after = before
    levels: list[Groups] = []
    while len(wholes) > 1:
        sides = [_side(g, n) for g in range(count)]
        levels.append([(before, after)[side][g] for g, side in enumerate(sides)])
        other = [wholes[(g >> n) ^ 1] for g in range(count)]
        before, after = (
            [times(other[g], x) if sides[g] == side else x for g, x in enumerate(every)]
            for side, every in ((ROW, before), (COLUMN, after))
        )
        wholes, n = [times(*wholes[g : g + 2]) for g in range(0, len(wholes), 2)], n + 1
    return levels, (before, after), wholes[0]


def _side(group: int, level: int) -> int:
    """The side of a group's tokens: in second halves they are rows."""
    return ROW if group >> level & 1 else COLUMN


def _cut(x: jax.Array, count: int) -> list[jax.Array]:
    size = x.shape[0] // count
    return [x[n * size : (n + 1) * size] for n in range(count)]


def _halves(x: jax.Array, size: int) -> list[jax.Array]:
    """The first and the second halves of the parts of ``2 * size`` rows, ``[c / 2, D]`` each."""
    parts = x.reshape(-1, 2, size, x.shape[-1])
    return [parts[:, n].reshape(-1, x.shape[-1]) for n in (0, 1)]


def _joined(first: jax.Array, second: jax.Array, size: int) -> jax.Array:
    width = first.shape[-1]
    return jnp.stack([x.reshape(-1, size, width) for x in (first, second)], axis=1).reshape(-1, width)
