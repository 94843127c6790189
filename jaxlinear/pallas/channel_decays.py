"""Decays of key channels within a chunk, inside kernels: as ``chunk_decays``, whose rules hold."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.chunk_decays import GROUP, dot, finite, in_groups, masked, pairs, places, with_same


class ByLevels:
    """A decay of each key channel: ``since_start``, ``until_end`` ``[c, K]`` and ``whole`` ``[1, K]`` as in ``ops.decay``.

    Two tokens of different groups meet at the middle of the smallest of the chunk's halves, quarters, ... that has both:
        exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j),   i > r >= j,
    so that both factors are at most 1. At each such level a token is on one side: there it is a row, decayed since the
    middle, or a column, decayed until the middle, and has one factor. What groups are, and the products within each, are
    the subclass's.
    """

    by_channel = True

    def __init__(self, seen: jax.Array, left: jax.Array):
        """Log decays to the base 2 since the start of a token's group and until its end, ``[N, size, K]``."""
        shape = -1, seen.shape[-1]
        far, before, after, whole = _far(seen[:, -1:])
        self._seen, self._left = jnp.exp2(seen), jnp.exp2(left)
        self._far = [None if x is None else jnp.exp2(x) for x in far]
        self.since_start = (self._seen * jnp.exp2(before)).reshape(shape)
        self.until_end = (self._left * jnp.exp2(after)).reshape(shape)
        self.whole = jnp.exp2(whole)
        self._pairs = pairs(seen.shape[0] * seen.shape[1])

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        """``A_ij = sum_k r_ik columns_jk exp(G_ik - G_jk)`` for i >= j, else 0, of each r of ``rows`` ``[c, K]``."""
        i, j = self._pairs
        apart = i ^ j
        products = []
        for r in rows:
            product = self._near_products(r, columns, apart, wide)
            for size, x, second, _ in self._scaled(r, columns):
                (first, own), far = _halves(product, size), _halves(apart, size)[1] >= size
                product = _joined(first, jnp.where(far, dot(second, x, (1, 1), wide), own), size)
            products.append(masked(i >= j, product))
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
            d_row, d_column = self._near_gradients(r, columns, d, apart, wide)
            d_columns = d_columns + d_column
            for size, x, _, factor in self._scaled(r, columns):
                crossing = (apart >= size) & (apart < 2 * size)
                d_x = factor * dot(masked(crossing, d).astype(x.dtype), x, (1, 0), wide)
                of_columns, of_row = _halves(d_x, size)
                first, second = _halves(d_row, size)
                d_row = _joined(first, second + of_row, size)
                first, second = _halves(d_columns, size)
                d_columns = _joined(first + of_columns, second, size)
            d_rows.append(d_row)
        return with_same(self._pairs, rows, columns, d_products, d_rows, d_columns)

    def _near_products(self, row: jax.Array, columns: jax.Array, apart: jax.Array, wide) -> jax.Array:
        """``pairwise`` of pairs of one group, and anything of others; of tokens i and j ``apart`` is i ^ j."""
        raise NotImplementedError

    def _near_gradients(
        self, row: jax.Array, columns: jax.Array, d_products: jax.Array, apart: jax.Array, wide
    ) -> tuple[jax.Array, jax.Array]:
        """Those of ``row`` and ``columns`` from ``d_products``, the same of (i, j) and (j, i), of pairs of one group."""
        raise NotImplementedError

    def _scaled(self, row: jax.Array, columns: jax.Array):
        """By level: the tokens of half of its parts; rows and columns in one array ``[c, K]`` of their dtype, the rows
        alone again ``[c / 2, K]``, and the factors in the first."""
        groups, dtype = self._seen.shape, row.dtype
        seen, left = (
            x.astype(factor.dtype).reshape(groups) * factor for x, factor in ((row, self._seen), (columns, self._left))
        )
        for n, factor in enumerate(self._far):
            x, second = _decayed(left, seen, factor, 1 << n)
            scale, _ = _decayed(self._left, self._seen, factor, 1 << n)
            yield groups[1] << n, x.astype(dtype), second.astype(dtype), scale


class ByChannel(ByLevels):
    """Any decay: groups are registers, and have the levels of their own halves, quarters and eighths."""

    def __init__(self, log_decay: jax.Array):
        groups = in_groups(to_base_2(finite(log_decay)))
        self._row = places(groups)
        near, seen, left = _near(groups, self._row)
        self._near = [jnp.exp2(x) for x in near]
        super().__init__(seen, left)

    def _near_products(self, row, columns, apart, wide) -> jax.Array:
        product = dot(row, columns, (1, 1), wide)
        for size, x, _ in self._near_scaled(row, columns):
            product = jnp.where(apart >= size, dot(x, x, (1, 1), wide), product)
        return product

    def _near_gradients(self, row, columns, d_products, apart, wide) -> tuple[jax.Array, jax.Array]:
        d_row: Any = 0.0
        d_columns: Any = 0.0
        for size, x, factor in self._near_scaled(row, columns):
            crossing = (apart >= size) & (apart < 2 * size)
            d_x = in_groups(factor * dot(masked(crossing, d_products).astype(x.dtype), x, (1, 0), wide))
            in_second = (self._row & size) != 0
            d_row = d_row + masked(in_second, d_x).reshape(x.shape)
            d_columns = d_columns + masked(~in_second, d_x).reshape(x.shape)
        return d_row, d_columns

    def _near_scaled(self, row: jax.Array, columns: jax.Array):
        """As ``_scaled``, but for the rows alone."""
        shape, dtype, wide = row.shape, row.dtype, self._seen.dtype
        row, columns = in_groups(row.astype(wide)), in_groups(columns.astype(wide))
        for n, factor in enumerate(self._near):
            x = jnp.where((self._row & (1 << n)) != 0, row, columns) * factor
            yield 1 << n, x.reshape(shape).astype(dtype), factor.reshape(shape)


def to_base_2(log_decay: jax.Array) -> jax.Array:
    """What ``exp2``, the hardware's, has for the exponential of ``log_decay``."""
    return log_decay * jnp.asarray(1 / math.log(2), log_decay.dtype)


def _decayed(first: jax.Array, second: jax.Array, factor: jax.Array | None, count: int) -> tuple[jax.Array, jax.Array]:
    """Of parts of ``2 * count`` groups, the first halves of ``first`` and the second halves of ``second``, times factors
    of groups ``[N, 1, K]``, None for 1; and the second halves alone."""
    (_, size, width), parts = first.shape, (-1, 2, count)
    halves = [x.reshape(*parts, size, width)[:, n] for n, x in enumerate((first, second))]
    if factor is not None:
        factor = factor.reshape(*parts, 1, width)
        halves = [x * factor[:, n] for n, x in enumerate(halves)]
    return jnp.stack(halves, axis=1).reshape(-1, width), halves[1].reshape(-1, width)


def _near(log_decay: jax.Array, row: jax.Array):
    """In groups of 8 tokens: a token's log decay since or until the middle of its 2, 4 and 8; since their start and until
    their end."""
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


def _far(totals: jax.Array):
    """From the sums of groups ``[N, 1, K]``: of each level above, those from the group to the middle, None for the first,
    where there is no group between; of all before and after it; of all."""
    count, width = totals.shape[0], totals.shape[-1]
    before = after = jnp.zeros_like(totals)
    levels: list[jax.Array | None] = []
    size = 1
    while size < count:
        first, second = (totals.reshape(-1, 2, 1, 1, width)[:, n] for n in (0, 1))
        (before_1, before_2), (after_1, after_2) = (
            [x.reshape(-1, 2, size, 1, width)[:, n] for n in (0, 1)] for x in (before, after)
        )
        levels.append(None if size == 1 else jnp.stack([after_1, before_2], axis=1).reshape(before.shape))
        before = jnp.stack([before_1, before_2 + first], axis=1).reshape(before.shape)
        after = jnp.stack([after_1 + second, after_2], axis=1).reshape(before.shape)
        totals, size = (first + second).reshape(-1, 1, width), 2 * size
    return levels, before, after, totals[0]


def _halves(x: jax.Array, size: int) -> list[jax.Array]:
    """Of the parts of ``2 * size`` rows, the first and the second halves, ``[c / 2, D]`` each."""
    parts = x.reshape(-1, 2, size, x.shape[-1])
    return [parts[:, n].reshape(-1, x.shape[-1]) for n in (0, 1)]


def _joined(first: jax.Array, second: jax.Array, size: int) -> jax.Array:
    width = first.shape[-1]
    return jnp.stack([x.reshape(-1, size, width) for x in (first, second)], axis=1).reshape(-1, width)
