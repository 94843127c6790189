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

    by_channel = False
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
    """A decay of the whole head: ``since_start``, ``until_end`` ``[c, 1 or c]`` and ``whole`` ``[1, 1 or c]`` as in
    ``ops.decay``, the same in all columns.

    Made of the log decays since the start and until the end, and of ``steps`` ``[c, c]``, which is G_i - G_j where i >= j
    and whatever it is elsewhere.
    """

    by_channel = False

    def __init__(self, steps: jax.Array, since_start: jax.Array, until_end: jax.Array):
        self._pairs = i, j = _pairs(steps.shape[0])
        self.matrix = jnp.exp(jnp.where(i >= j, steps, jnp.full_like(steps, -jnp.inf)))
        self.since_start, self.until_end = jnp.exp(since_start), jnp.exp(until_end)
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


def by_sums(coarse: jax.Array, fine: jax.Array) -> ByHead:
    """From the two parts of the sums of ``head_sums.cut``, ``[1, c]`` each."""
    # A row turned as many rows is each token's number in all columns: cheaper than one column that is spread.
    columns = [jnp.broadcast_to(x, (x.shape[1], x.shape[1])).T for x in (coarse, fine)]
    steps = [x - y for x, y in zip(columns, (coarse, fine), strict=True)]
    left = [x[:, -1:] - y for x, y in zip((coarse, fine), columns, strict=True)]
    return ByHead(steps[0] + steps[1], columns[0] + columns[1], left[0] + left[1])


def constant(log_decay: jax.Array, length: int, last: Any) -> ByHead:
    """Of a log decay ``[1, 1]`` that is the same for all tokens up to the one of number ``last``, and 0 behind it."""
    i, j = (jnp.minimum(x, last).astype(log_decay.dtype) for x in _pairs(length))
    return ByHead((i - j) * log_decay, (i + 1) * log_decay, (i[-1:] - i) * log_decay)


def by_heads(log_decay: jax.Array) -> list[ByHead]:
    """Of each head's ``[c]`` in ``[c, n]``, summed as ``head_sums.cut`` does."""
    sums = [prefix_sums(part) for part in cut(log_decay, log_decay.shape[0])]
    rows = [x.T for x in sums]
    found = []
    for n in range(log_decay.shape[1]):
        (coarse, fine), (coarse_row, fine_row) = (x[:, n : n + 1] for x in sums), (x[n : n + 1] for x in rows)
        left = (coarse[-1:] - coarse) + (fine[-1:] - fine)
        found.append(ByHead((coarse - coarse_row) + (fine - fine_row), coarse + fine, left))
    return found


def cut(log_decay: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Whole multiples of a unit of which ``length``, down to the floor of log decays, are summed exactly; and the rest."""
    dtype = log_decay.dtype
    unit = 2.0 ** math.ceil(math.log2(-_floor(dtype) * length / 2 ** (jnp.finfo(dtype).nmant + 1)))
    coarse = jnp.ceil(log_decay * (1 / unit)) * unit
    return coarse, log_decay - coarse


class ByChannel:
    """A decay of each key channel: ``since_start``, ``until_end`` ``[c, K]`` and ``whole`` ``[1, K]`` as in ``ops.decay``.

    Two tokens meet at the middle of the smallest of the chunk's halves, quarters, ... that has both:
        exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j),   i > r >= j,
    so that both factors are at most 1. At each such level a token is on one side: there it is a row, decayed since the
    middle, or a column, decayed until the middle, and has one factor.
    """

    by_channel = True

    def __init__(self, log_decay: jax.Array):
        groups = _groups(log_decay * jnp.asarray(1 / math.log(2), log_decay.dtype))  # to the base of the hardware
        self._row = _rows(groups)
        near, seen, left = _near(groups, self._row)
        self._near = [jnp.exp2(x) for x in near]
        self._seen, self._left = jnp.exp2(seen), jnp.exp2(left)
        far, before, after, whole = _far(seen[:, -1:])
        self._far = [jnp.exp2(x) for x in far]
        self.since_start = (self._seen * jnp.exp2(before)).reshape(log_decay.shape)
        self.until_end = (self._left * jnp.exp2(after)).reshape(log_decay.shape)
        self.whole = jnp.exp2(whole)
        self._pairs = _pairs(log_decay.shape[0])

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        """``A_ij = sum_k r_ik columns_jk exp(G_ik - G_jk)`` for i >= j, else 0, of each r of ``rows`` ``[c, K]``."""
        i, j = self._pairs
        apart = i ^ j
        products = []
        for r in rows:
            product = dot(r, columns, (1, 1), wide)
            for size, x, second, _ in self._scaled(r, columns):
                if second is None:
                    product = jnp.where(apart >= size, dot(x, x, (1, 1), wide), product)
                else:
                    (first, own), far = _halves(product, size), _halves(apart, size)[1] >= size
                    product = _joined(first, jnp.where(far, dot(second, x, (1, 1), wide), own), size)
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
            for size, x, second, factor in self._scaled(r, columns):
                crossing = (apart >= size) & (apart < 2 * size)
                d_x = factor * dot(_masked(crossing, d).astype(x.dtype), x, (1, 0), wide)
                if second is None:
                    d_x, in_second = _groups(d_x), (self._row & size) != 0
                    d_row = d_row + _masked(in_second, d_x).reshape(x.shape)
                    d_columns = d_columns + _masked(~in_second, d_x).reshape(x.shape)
                else:
                    of_columns, of_row = _halves(d_x, size)
                    first, second = _halves(d_row, size)
                    d_row = _joined(first, second + of_row, size)
                    first, second = _halves(d_columns, size)
                    d_columns = _joined(first + of_columns, second, size)
            d_rows.append(d_row)
        return _with_same(self._pairs, rows, columns, d_products, d_rows, d_columns)

    def _scaled(self, row: jax.Array, columns: jax.Array):
        """By level: the tokens of half of its parts; rows and columns in one array ``[c, K]`` of their dtype, where parts
        are whole groups the rows alone again ``[c / 2, K]``; and the factors in them."""
        shape, dtype, wide = row.shape, row.dtype, self._seen.dtype
        row, columns = _groups(row.astype(wide)), _groups(columns.astype(wide))
        for n, factor in enumerate(self._near):
            x = jnp.where((self._row & (1 << n)) != 0, row, columns) * factor
            yield 1 << n, x.reshape(shape).astype(dtype), None, factor.reshape(shape)
        seen, left = row * self._seen, columns * self._left
        for n, factor in enumerate(self._far):
            x, second = _decayed(left, seen, factor, 1 << n)
            yield (
                _GROUP << n,
                x.astype(dtype),
                second.astype(dtype),
                _decayed(self._left, self._seen, factor, 1 << n)[0],
            )


def _decayed(first: jax.Array, second: jax.Array, factor: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Of parts of ``2 * count`` groups, the first halves of ``first`` and the second halves of ``second``, times factors
    of groups ``[N, 1, K]``; and the second halves alone."""
    width, parts = first.shape[-1], (-1, 2, count)
    factor = factor.reshape(*parts, 1, width)
    halves = [x.reshape(*parts, _GROUP, width)[:, n] * factor[:, n] for n, x in enumerate((first, second))]
    return jnp.stack(halves, axis=1).reshape(-1, width), halves[1].reshape(-1, width)


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
