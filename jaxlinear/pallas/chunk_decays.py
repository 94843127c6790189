"""Decays within a chunk, inside kernels: of one token for another, and products of tokens decayed by them.

The rules are those of ``ops.decay``: no exponent is above 0, and each is a sum of nothing but what it is of. A log decay is
finite (``finite``): ``[c, K]`` by key channel, ``[c, n]`` of n heads; c is 8 times a power of two. All arrays are values
in registers, float32 (float64 where kernels are interpreted), and functions use what Mosaic compiles for TPU.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

_GROUP = 8  # tokens of a register


def finite(log_decay: jax.Array) -> jax.Array:
    """-inf is no summand: log decays below a floor whose exponential is zero are that floor."""
    return jnp.maximum(log_decay, jnp.asarray(_floor(log_decay.dtype), log_decay.dtype))


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int], wide) -> jax.Array:
    """The product of two matrices over one axis of each, summed in ``wide``; float32 is not cut to fewer bits."""
    y = y.astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == wide else None
    return lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=wide)


def suffix_sums(x: jax.Array) -> jax.Array:
    """``y_i = sum_{j >= i} x_j`` of ``[c, D]``."""
    return _running(x, -1)


def prefix_sums(x: jax.Array) -> jax.Array:
    """``y_i = sum_{j <= i} x_j`` of ``[c, D]``."""
    return _running(x, 1)


def _running(x: jax.Array, step: int) -> jax.Array:
    groups = _groups(x)
    row = _rows(groups)
    for by in (1, 2, 4):
        reached = row >= by if step == 1 else row < _GROUP - by
        shifted = pltpu.roll(groups, by if step == 1 else _GROUP - by, axis=1)
        groups = groups + jnp.where(reached, shifted, jnp.zeros_like(groups))
    totals = groups[:, -1:] if step == 1 else groups[:, :1]
    order = range(groups.shape[0]) if step == 1 else reversed(range(groups.shape[0]))
    before, total = {}, jnp.zeros_like(totals[0])
    for n in order:
        before[n], total = total, total + totals[n]
    return (groups + jnp.stack([before[n] for n in range(groups.shape[0])])).reshape(x.shape)


class NoDecay:
    """As the classes below, of no decay: what scales a state or a token is None."""

    since_start = until_end = whole = None

    def __init__(self, length: int):
        self._lower = _pairs(length)

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        i, j = self._lower
        return [_masked(i >= j, dot(r, columns, (1, 1), wide)) for r in rows]

    def pairwise_gradient(self, rows, columns, d_products, wide) -> tuple[list[jax.Array], jax.Array, None]:
        i, j = self._lower
        d = [_masked(i >= j, d) for d in d_products]
        return *_back(rows, columns, d, wide), None


class ByHead:
    """A decay of the whole head: ``since_start``, ``until_end`` ``[c, 1]`` and ``whole`` ``[1, 1]`` as in ``ops.decay``.

    Made by ``by_heads``.
    """

    def __init__(self, columns: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, jax.Array]):
        (coarse, fine), (coarse_row, fine_row) = columns, rows
        self._pairs = i, j = _pairs(coarse.shape[0])
        steps = (coarse - coarse_row) + (fine - fine_row)
        self.matrix = _masked(i >= j, jnp.exp(_masked(i > j, steps)))
        self.since_start = jnp.exp(coarse + fine)
        self.until_end = jnp.exp((coarse[-1:] - coarse) + (fine[-1:] - fine))
        self.whole = self.since_start[-1:]

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        """``A_ij = sum_k r_ik columns_jk exp(G_i - G_j)`` for i >= j, zero elsewhere, of each r of ``rows`` ``[c, K]``."""
        return [self.matrix * dot(r, columns, (1, 1), wide) for r in rows]

    def pairwise_gradient(self, rows, columns, d_products, wide) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """As ``ByChannel.pairwise_gradient``."""
        i, j = self._pairs
        d = [_masked(i > j, self.matrix * d) for d in d_products]
        d_rows, d_columns = _back(rows, columns, d, wide)
        return _with_same(self._pairs, rows, columns, d_products, d_rows, d_columns)


def by_heads(log_decay: jax.Array) -> list[ByHead]:
    """Of each head's ``[c]`` in ``[c, n]``.

    Each log decay is cut in a whole multiple of one unit and a small rest. The multiples are summed exactly, so that the
    differences of their sums are exact as well.
    """
    length, bits = log_decay.shape[0], jnp.finfo(log_decay.dtype)
    unit = 2.0 ** math.ceil(math.log2(-_floor(log_decay.dtype) * length / 2 ** (bits.nmant + 1)))
    coarse = jnp.ceil(log_decay * (1 / unit)) * unit
    sums = [prefix_sums(part) for part in (coarse, log_decay - coarse)]
    rows = [x.T for x in sums]
    heads = [slice(n, n + 1) for n in range(log_decay.shape[1])]
    return [ByHead((sums[0][:, h], sums[1][:, h]), (rows[0][h], rows[1][h])) for h in heads]


class ByChannel:
    """A decay of each key channel: ``since_start``, ``until_end`` ``[c, K]`` and ``whole`` ``[1, K]`` as in ``ops.decay``.

    Two tokens meet at the middle of the smallest of the chunk's halves, quarters, ... that has both:
        exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j),   i > r >= j,
    so that both factors are at most 1. At each such level a token is on one side: there it is a row, decayed since the
    middle, or a column, decayed until the middle, and has one factor.
    """

    def __init__(self, log_decay: jax.Array):
        groups = _groups(log_decay)
        self._row = _rows(groups)
        near, seen, left = _near(groups, self._row)
        self._near = [jnp.exp(x) for x in near]
        self._seen, self._left = jnp.exp(seen), jnp.exp(left)
        far, before, after, whole = _far(seen[:, -1:])
        self._far = [jnp.exp(x) for x in far]
        self.since_start = (self._seen * jnp.exp(before)).reshape(log_decay.shape)
        self.until_end = (self._left * jnp.exp(after)).reshape(log_decay.shape)
        self.whole = jnp.exp(whole)
        self._pairs = _pairs(log_decay.shape[0])

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        """``A_ij = sum_k r_ik columns_jk exp(G_ik - G_jk)`` for i >= j, else 0, of each r of ``rows`` ``[c, K]``."""
        i, j = self._pairs
        apart = i ^ j
        products = []
        for r in rows:
            product = dot(r, columns, (1, 1), wide)
            for level, (x, _) in enumerate(self._scaled(r, columns)):
                size = 1 << level
                if size < _GROUP:
                    product = jnp.where(apart >= size, dot(x, x, (1, 1), wide), product)
                    continue
                second, of_second = _halves(x, size)[1], _halves(apart, size)[1]
                crossed = dot(second, x, (1, 1), wide)
                first, own = _halves(product, size)
                product = _joined(first, jnp.where(of_second >= size, crossed, own), size)
            products.append(_masked(i >= j, product))
        return products

    def pairwise_gradient(self, rows, columns, d_products, wide) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """From the gradients of ``pairwise``'s products.

        Returns:
          those of ``rows`` and of ``columns``; and ``sum r dr - columns dcolumns`` ``[c, K]``, the products of a token with
          itself left out: the gradient of the log decays is its ``suffix_sums``.
        """
        i, j = self._pairs
        apart = i ^ j
        d_rows: list[jax.Array] = []
        d_columns: Any = 0.0
        for r, d in zip(rows, d_products, strict=True):
            # Of both tokens of a pair at once: each product has one of them as a row, the other as a column.
            d = jnp.where(i > j, d, d.T)
            d_row: Any = 0.0
            for level, (x, factor) in enumerate(self._scaled(r, columns)):
                size = 1 << level
                crossing = (apart >= size) & (apart < 2 * size)
                d_x = factor * dot(_masked(crossing, d).astype(x.dtype), x, (1, 0), wide).reshape(factor.shape)
                in_second = self._in_second(size)
                d_row = d_row + _masked(in_second, d_x)
                d_columns = d_columns + _masked(~in_second, d_x)
            d_rows.append(d_row.reshape(r.shape))
        return _with_same(self._pairs, rows, columns, d_products, d_rows, d_columns.reshape(columns.shape))

    def _in_second(self, size: int) -> jax.Array:
        if size < _GROUP:
            return (self._row & size) != 0
        group = lax.broadcasted_iota(jnp.int32, self._row.shape, 0)
        return (group & (size // _GROUP)) != 0

    def _scaled(self, row: jax.Array, columns: jax.Array):
        """By level: rows and columns in one array ``[c, K]`` of their dtype, and the factors in it."""
        wide = self._seen.dtype
        row, columns, dtype, shape = _groups(row.astype(wide)), _groups(columns.astype(wide)), row.dtype, row.shape
        for n, factor in enumerate(self._near):
            x = jnp.where(self._in_second(1 << n), row, columns) * factor
            yield x.reshape(shape).astype(dtype), factor
        seen, left = row * self._seen, columns * self._left
        for n, factor in enumerate(self._far):
            size = _GROUP << n
            in_second = self._in_second(size)
            x = jnp.where(in_second, seen, left) * factor
            yield x.reshape(shape).astype(dtype), jnp.where(in_second, self._seen, self._left) * factor


def _near(log_decay: jax.Array, row: jax.Array):
    """In groups of 8 tokens: a token's log decay since or until the middle of its 2, 4 and 8; since their start and until
    their end."""
    none = jnp.zeros_like(log_decay)
    odd, second, later = ((row & size) != 0 for size in (1, 2, 4))
    before, after = (pltpu.roll(log_decay, by, axis=1) for by in (1, _GROUP - 1))
    levels = [jnp.where(odd, log_decay, none)]
    seen, left = jnp.where(odd, log_decay + before, log_decay), jnp.where(odd, none, after)
    levels.append(jnp.where(second, seen, left))
    of_first, of_second = (jnp.where(later, seen[:, n + 4 : n + 5], seen[:, n : n + 1]) for n in (1, 3))
    seen, left = seen + jnp.where(second, of_first, none), left + jnp.where(second, none, of_second)
    levels.append(jnp.where(later, seen, left))
    of_first, of_second = seen[:, 3:4], seen[:, 7:8]
    seen, left = seen + jnp.where(later, of_first, none), left + jnp.where(later, none, of_second)
    return levels, seen, left


def _far(totals: jax.Array):
    """From the sums of groups ``[N, 1, K]``: of each level above, those from the group to the middle; of all before and
    after it; of all."""
    count, width = totals.shape[0], totals.shape[-1]
    before = after = jnp.zeros_like(totals)
    levels, size = [], 1
    while size < count:
        first, second = (totals.reshape(-1, 2, 1, 1, width)[:, n] for n in (0, 1))
        (before_1, before_2), (after_1, after_2) = (
            [x.reshape(-1, 2, size, 1, width)[:, n] for n in (0, 1)] for x in (before, after)
        )
        levels.append(jnp.stack([after_1, before_2], axis=1).reshape(before.shape))
        before = jnp.stack([before_1, before_2 + first], axis=1).reshape(before.shape)
        after = jnp.stack([after_1 + second, after_2], axis=1).reshape(before.shape)
        totals, size = (first + second).reshape(-1, 1, width), 2 * size
    return levels, before, after, totals[0]


def _back(rows, columns, d_products, wide):
    d_rows = [dot(d.astype(columns.dtype), columns, (1, 0), wide) for d in d_products]
    d_columns = sum(dot(d.astype(r.dtype), r, (0, 0), wide) for r, d in zip(rows, d_products, strict=True))
    return d_rows, d_columns


def _with_same(pairs, rows, columns, d_products, d_rows, d_columns):
    """The products of a token with itself, which have no decay, added to the gradients of the others."""
    i, j = pairs
    wide_columns = columns.astype(d_columns.dtype)
    sums, every = -wide_columns * d_columns, []
    for r, d, d_row in zip(rows, d_products, d_rows, strict=True):
        r, same = r.astype(d.dtype), jnp.sum(_masked(i == j, d), axis=1, keepdims=True)
        sums = sums + r * d_row
        every.append(d_row + same * wide_columns)
        d_columns = d_columns + same * r
    return every, d_columns, sums


def _halves(x: jax.Array, size: int) -> list[jax.Array]:
    """Of the parts of ``2 * size`` rows, the first and the second halves, ``[c / 2, D]`` each."""
    parts = x.reshape(-1, 2, size, x.shape[-1])
    return [parts[:, n].reshape(-1, x.shape[-1]) for n in (0, 1)]


def _joined(first: jax.Array, second: jax.Array, size: int) -> jax.Array:
    width = first.shape[-1]
    return jnp.stack([x.reshape(-1, size, width) for x in (first, second)], axis=1).reshape(-1, width)


def _groups(x: jax.Array) -> jax.Array:
    return x.reshape(-1, _GROUP, x.shape[-1])


def _rows(groups: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, groups.shape, 1)


def _pairs(length: int) -> tuple[jax.Array, jax.Array]:
    i, j = (lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return i, j


def _masked(condition: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(condition, x, jnp.zeros_like(x))


def _floor(dtype) -> float:
    return -128.0 if jnp.finfo(dtype).bits == 32 else -1024.0
