"""Decays of key channels within a chunk, inside kernels, under the rules of ``chunk_decays``."""

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts.chunk_decays import GROUP, finite, in_groups, masked, pairs, places, times
from jaxlinear.pallas.parts.products import dot, dot_terms, terms

Groups: TypeAlias = Sequence[jax.Array]  # for each group a register, ``[8, K]``, of equal rows
Outer: TypeAlias = tuple[Sequence[jax.Array], jax.Array]  # for each of some rows, and for the columns, ``[c, K]``
ROW, COLUMN = 0, 1  # the index in pairs: since or before, until or after


class Gradients(NamedTuple):
    rows: list[jax.Array]  # ``[c, K]`` each, like ``columns``
    columns: jax.Array
    tokens: jax.Array  # [c, K]; the gradient of the log decays is ``suffix_sums(tokens) + total``
    total: jax.Array  # [1, K]


class ByLevels:
    """A decay of each key channel, from ``[c, K]``: ``whole`` ``[1, K]`` as in ``ops.decay``.

    Two tokens of different groups meet at the middle of the smallest of the chunk's halves, quarters, ... that has both:
        exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j),   i > r >= j,
    so both factors are at most 1. At each such level a token is on one side: a row, decayed since the middle, or a column,
    decayed until it. From one level to the next, where two parts join, rows in the second are also decayed by all of the
    first, and columns in the first by all of the second. Subclasses define the groups and the products within each.
    """

    by_channel = True

    def __init__(self, own: tuple[jax.Array, jax.Array], ends: tuple[Groups, Groups] | None, wholes: Groups):
        """``own`` ``[c, K]``: a token's decays as a row, since a position in its group, and as a column, until one.
        ``ends``: for each group the decays from its start to that position, and from there to its end; None if its start
        and end are these positions. ``wholes``: its total decay."""
        self._own, self._ends, self._wholes = own, ends, [wholes]
        while len(wholes) > 1:
            wholes = [x * y for x, y in zip(wholes[::2], wholes[1::2], strict=True)]
            self._wholes.append(wholes)
        self.whole = wholes[0][:1]
        self._pairs = pairs(own[ROW].shape[0])

    def from_start(self, x: jax.Array, factor: jax.Array | None) -> jax.Array:
        """x decayed since the chunk's start, times ``factor``; in the dtype of x."""
        return times(factor, self._of_chunk(x, ROW)).astype(x.dtype)

    def to_end(self, x: jax.Array, factor: jax.Array | None) -> jax.Array:
        """x decayed until the chunk's end, times ``factor``; in the dtype of x."""
        return times(factor, self._of_chunk(x, COLUMN)).astype(x.dtype)

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        """``A_ij = sum_k r_ik columns_jk exp(G_ik - G_jk)`` for i >= j, else 0, for each r of ``rows`` ``[c, K]``.
        Where r is ``columns`` itself, as in the delta rule, entries with i = j are unspecified; so are their gradients."""
        i, j = self._pairs
        apart = i ^ j
        products = self._near_products(rows, columns, apart, wide)
        for n, meeting in enumerate(self._meeting(rows, columns)):
            size = self._size << n
            second = jnp.concatenate([_halves(x, size)[1] for x in meeting]).astype(columns.dtype)
            crossing = dot(second, meeting[0].astype(columns.dtype), (1, 1), wide)
            far = _halves(apart, size)[1] >= size
            for m, new in enumerate(_split(crossing, len(rows))):
                above, own = _halves(products[m], size)
                products[m] = _joined(above, jnp.where(far, new, own), size)
        return [masked(i >= j, x) for x in products]

    def gradients(self, rows, columns, d_products, outer: Outer, last: jax.Array | int, wide, count=1) -> Gradients:
        """From the gradients of ``pairwise``'s products and, in ``outer``, those of ``from_start`` of ``rows`` and
        ``to_end`` of ``columns``, wide. ``last``: the index of the last token. The last of ``d_products`` is multiplied in
        ``count`` terms: more than one where the gradients of the decays are small differences of the results."""
        i, j = self._pairs
        apart = i ^ j
        near, far = [], []
        by_level = list(self._meeting(rows, columns))
        for m, (r, d, in_terms) in enumerate(zip(rows, d_products, last_counts(count, rows), strict=True)):
            # For both tokens of a pair at once: each product has one of them as a row and the other as a column.
            d = masked(i > j, d)
            both = jnp.where(i > j, d, d.T)
            crossing = [masked((apart >= size) & (apart < 2 * size), both) for size in self._sizes]
            far.append(
                [
                    dot_terms(terms(x, columns.dtype, in_terms), (y[m].astype(columns.dtype),), (1, 0), wide)
                    for x, y in zip(crossing, by_level, strict=True)
                ]
            )
            near.append(self._near_gradients(r, columns, (d, both), apart, wide, in_terms))
        outer_rows, outer_columns = outer
        d_rows = [
            self._with_near(x[ROW], self._far_gradients(y, z, ROW), ROW)
            for x, y, z in zip(near, far, outer_rows, strict=True)
        ]
        d_columns = self._with_near(
            functools.reduce(operator.add, [x[COLUMN] for x in near]),
            self._far_gradients(
                [functools.reduce(operator.add, x) for x in zip(*far, strict=True)], outer_columns, COLUMN
            ),
            COLUMN,
        )
        ended = self._of_chunk(columns, COLUMN)
        return with_decays(self._pairs, rows, columns, d_products, (d_rows, d_columns), ended * outer_columns, last)

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
        """The gradients of ``row`` and ``columns`` for pairs within a group, for ``_with_near``, from ``d_products``, in
        ``count`` terms: where i > j alone, and the same for (i, j) and (j, i)."""
        raise NotImplementedError

    def _with_near(self, near: jax.Array, far: jax.Array, side: int) -> jax.Array:
        """The sum of ``_near_gradients`` and of those for pairs of groups, ``far``, which lacks the tokens' own decays."""
        raise NotImplementedError

    @property
    def _size(self) -> int:
        """Number of tokens in a group."""
        return self._own[ROW].shape[0] // len(self._wholes[0])

    @property
    def _sizes(self) -> list[int]:
        """Numbers of tokens in what meets at each level."""
        return [self._size << n for n in range(len(self._wholes) - 1)]

    def _meeting(self, rows, columns) -> Iterator[list[jax.Array]]:
        """By level, for each of ``rows``: the columns and, in second halves, the rows that meet there, wide."""
        steps = [self._by_level(columns, COLUMN), *(self._by_level(r, ROW) for r in rows)]
        for n in range(len(self._sizes)):
            of_columns, *of_rows = (next(x) for x in steps)
            sides = [_side(g, n) for g in range(len(of_columns))]
            yield [jnp.concatenate([(x, of_columns)[side][g] for g, side in enumerate(sides)]) for x in of_rows]

    def _of_chunk(self, x: jax.Array, side: int) -> jax.Array:
        """x as rows decayed since the chunk's start, or as columns until its end, wide."""
        *_, last = self._by_level(x, side)
        return jnp.concatenate(last)

    def _by_level(self, x: jax.Array, side: int) -> Iterator[list[jax.Array]]:
        """By level and group: x as rows decayed since the start of the parts that meet there, or as columns until their
        end; and last, those of the chunk."""
        own = self._own[side]
        groups = _split(own * x.astype(own.dtype), len(self._wholes[0]))
        if self._ends is not None:
            groups = [_scaled_by(y, z) for y, z in zip(self._ends[side], groups, strict=True)]
        yield groups
        for n in range(len(self._sizes)):
            groups = [self._past(n, g, side, y) for g, y in enumerate(groups)]
            yield groups

    def _far_gradients(self, found: Sequence[jax.Array], outer: jax.Array, side: int) -> jax.Array:
        """From the gradients of ``_meeting`` and of ``_of_chunk``, those of the tokens times their own decays."""
        count = len(self._wholes[0])
        groups = _split(outer, count)
        for n, x in reversed(list(enumerate(found))):
            new = _split(x, count)
            groups = [self._past(n, g, side, y) for g, y in enumerate(groups)]
            groups = [y + new[g] if _side(g, n) == side else y for g, y in enumerate(groups)]
        if self._ends is not None:
            groups = [_scaled_by(y, z) for y, z in zip(self._ends[side], groups, strict=True)]
        return jnp.concatenate(groups)

    def _past(self, n: int, group: int, side: int, x: jax.Array) -> jax.Array:
        """x decayed by all of the part that its group's part meets at level n, if it is on the side that does."""
        return _scaled_by(self._wholes[n][(group >> n) ^ 1], x) if _side(group, n) == side else x


class ByChannel(ByLevels):
    """Any decay: groups are registers, with levels for their own halves, quarters and eighths."""

    def __init__(self, log_decay: jax.Array):
        groups = in_groups(to_base_2(finite(log_decay)))
        self._row = places(groups)
        near, seen, left = _near(groups, self._row)
        self._near = [jnp.exp2(x) for x in near]
        own = jnp.exp2(seen).reshape(log_decay.shape), jnp.exp2(left).reshape(log_decay.shape)
        super().__init__(own, None, list(jnp.exp2(jnp.broadcast_to(seen[:, -1:], seen.shape))))

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

    def _with_near(self, near, far, side) -> jax.Array:
        return near + self._own[side] * far

    def _near_scaled(self, row: jax.Array, columns: jax.Array):
        """By level: the tokens of half of its parts as rows and those of the others as columns, in one array ``[c, K]`` of
        their dtype; and the factors in it."""
        shape, dtype, wide = row.shape, row.dtype, self._near[0].dtype
        row, columns = in_groups(row.astype(wide)), in_groups(columns.astype(wide))
        for n, factor in enumerate(self._near):
            x = jnp.where((self._row & (1 << n)) != 0, row, columns) * factor
            yield 1 << n, x.reshape(shape).astype(dtype), factor.reshape(shape)


def last_counts(count: int, rows) -> list[int]:
    """For each of ``rows``: ``count`` for the last, 1 for the others."""
    return [1] * (len(rows) - 1) + [count]


def with_decays(pairs, rows, columns, d_products, found, ended: jax.Array, last) -> Gradients:
    """``found``: the gradients of rows and columns. The products of a token with itself, without a decay, are added here;
    except to those of ``columns`` as a row. ``ended``: columns decayed to the chunk's end, times the gradients of that."""
    i, j = pairs
    (d_rows, d_columns), every = found, []
    wide_columns = columns.astype(d_columns.dtype)
    # The last token's write does not decay. Summed with terms that do, it would drown them or be lost among them.
    decays = lax.broadcasted_iota(jnp.int32, ended.shape, 0) != last
    tokens, total = -masked(decays, wide_columns * d_columns), jnp.sum(masked(decays, ended), axis=0, keepdims=True)
    for r, d, d_row in zip(rows, d_products, d_rows, strict=True):
        wide_row = r.astype(d.dtype)
        tokens = tokens + wide_row * d_row
        if r is not columns:
            same = jnp.sum(masked(i == j, d), axis=1, keepdims=True)
            d_row, d_columns = d_row + same * wide_columns, d_columns + same * wide_row
        every.append(d_row)
    return Gradients(every, d_columns, tokens, total)


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


def _side(group: int, level: int) -> int:
    """The side of a group's tokens: in second halves they are rows."""
    return ROW if group >> level & 1 else COLUMN


def _scaled_by(factor: jax.Array, x: jax.Array) -> jax.Array:
    """``factor`` ``[8, K]``, of equal rows, times x ``[c, K]``."""
    return (factor[None] * in_groups(x)).reshape(x.shape)


def _split(x: jax.Array, count: int) -> list[jax.Array]:
    size = x.shape[0] // count
    return [x[n * size : (n + 1) * size] for n in range(count)]


def _halves(x: jax.Array, size: int) -> list[jax.Array]:
    """The first and the second halves of the parts of ``2 * size`` rows, ``[c / 2, D]`` each."""
    parts = x.reshape(-1, 2, size, x.shape[-1])
    return [parts[:, n].reshape(-1, x.shape[-1]) for n in (0, 1)]


def _joined(first: jax.Array, second: jax.Array, size: int) -> jax.Array:
    width = first.shape[-1]
    return jnp.stack([x.reshape(-1, size, width) for x in (first, second)], axis=1).reshape(-1, width)
