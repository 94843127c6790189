"""Decays of key channels within a chunk, inside GPU kernels, and products of tokens decayed by them.

If no channel of a tile decays by more than ``factored_decays.LIMIT`` in half the chunk, and products are in bfloat16, the
products of all pairs are one product of two factors around the middle m,

    exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j),   i >= j

Otherwise tokens meet at the middle of the smallest of the chunk's halves, quarters, ... that has both, with no exponent
above 0 (``channel_decays.ByChannel``). The kernel contains both and chooses by the decays. Sums of decays are products with
triangles of ones, each a sum of only the log decays that it stands for.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.pallas.parts.factored_decays import LIMIT, takes
from jaxlinear.pallas.parts.gpu_layout import Layout, crossing, dot, exp, finite, scaled


class ByChannel:
    """For a tile of log decays ``[c, tile]`` as they are given. ``since_start``, ``until_end`` ``[c, tile]``, ``whole``
    ``[tile]``: the decays since the start of the chunk, until its end, and over all of it."""

    def __init__(self, given: jax.Array, layout: Layout):
        plan = layout.plan
        self._layout, self._log_decay = layout, finite(given.astype(plan.wide))
        self._row, self._lane = (lax.broadcasted_iota(jnp.int32, (layout.chunk,) * 2, axis) for axis in (0, 1))
        self._parts = _split(self._log_decay, plan.narrow, 1 if given.dtype == plan.narrow else 2)
        self._factors = takes(plan.narrow, plan.wide)

    @functools.cached_property
    def since_start(self) -> jax.Array:
        return exp(self._summed(self._row >= self._lane))

    @functools.cached_property
    def until_end(self) -> jax.Array:
        return exp(self._summed(self._row < self._lane))

    @functools.cached_property
    def whole(self) -> jax.Array:
        return exp(jnp.sum(self._log_decay, axis=0))

    def products(self, rows: list[jax.Array], columns: jax.Array) -> list[jax.Array]:
        """``[c, c]`` for each r of ``rows`` ``[c, tile]``: ``sum_k r_ik columns_jk exp(G_i - G_j)`` for i >= j, arbitrary
        elsewhere."""
        layout = self._layout

        def factored(since_middle):
            row, column = exp(since_middle), scaled(columns, exp(-since_middle))
            return [dot(scaled(r, row), column, (1, 1), layout) for r in rows]

        def level(n, found):
            across, seen, left = self._level(n)
            column = scaled(columns, left)
            products = [dot(scaled(r, seen), column, (1, 1), layout) for r in rows]
            return [jnp.where(across, x, y) for x, y in zip(products, found, strict=True)]

        return self._either(factored, level, lambda: [dot(r, columns, (1, 1), layout) for r in rows])

    def products_gradient(self, rows, columns, d_products) -> tuple[list[jax.Array], jax.Array]:
        """The gradients of ``rows`` and ``columns``, from those of the products, which are zero except where i > j."""
        layout = self._layout
        none = jnp.zeros(columns.shape, layout.plan.wide)

        def factored(since_middle):
            row, until_middle = exp(since_middle), exp(-since_middle)
            column, d_rows, d_columns = scaled(columns, until_middle), [], none
            for r, d in zip(rows, d_products, strict=True):
                d_rows.append(row * dot(d, column, (1, 0), layout))
                d_columns = d_columns + dot(d, scaled(r, row), (0, 0), layout)
            return d_rows, until_middle * d_columns

        def level(n, found):
            (d_rows, d_columns), (across, seen, left) = found, self._level(n)
            column, sums = scaled(columns, left), []
            for r, d, d_row in zip(rows, d_products, d_rows, strict=True):
                d = jnp.where(across, d, jnp.zeros_like(d))
                sums.append(d_row + seen * dot(d, column, (1, 0), layout))
                d_columns = d_columns + left * dot(d, scaled(r, seen), (0, 0), layout)
            return sums, d_columns

        return self._either(factored, level, lambda: ([none for _ in rows], none))

    def from_last(self, x: jax.Array) -> jax.Array:
        """``y_i = sum_{j >= i} x_j`` of ``[c, tile]``."""
        narrow = self._layout.plan.narrow
        return self._summed(self._row <= self._lane, _split(x, narrow, 1 if narrow == x.dtype else 3))

    def _summed(self, of: jax.Array, parts: list[jax.Array] | None = None) -> jax.Array:
        """Sums over the tokens selected by each row of a matrix of 1, 0 and -1."""
        of = of.astype(self._layout.plan.narrow)
        products = [dot(of, part, (1, 0), self._layout) for part in parts or self._parts]
        return functools.reduce(jnp.add, reversed(products))

    def _either(self, factored: Callable, level: Callable, first: Callable) -> Any:
        """``factored`` of the decays since the middle, or ``first`` as changed by the levels: a loop that is not unrolled,
        since otherwise the loads of all levels take registers at once."""

        def by_levels(*_):
            return lax.fori_loop(jnp.int32(0), jnp.int32(self._layout.chunk.bit_length() - 1), level, first())

        if not self._factors:
            return by_levels()
        row, lane, middle = self._row, self._lane, self._layout.chunk // 2 - 1
        later, earlier = (lane > middle) & (lane <= row), (lane <= middle) & (lane > row)
        since_middle = self._summed(later.astype(jnp.int32) - earlier.astype(jnp.int32))
        weak = jnp.max(jnp.abs(since_middle)) <= LIMIT
        return lax.cond(weak, factored, by_levels, since_middle)

    def _level(self, n) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The pairs of tokens that meet at the start of a second part of 2^n, and for each token the decay since the start
        of its part and that until its end."""
        row, lane = self._row, self._lane
        part = (row >> n) == (lane >> n)
        seen, left = self._summed(part & (row >= lane)), self._summed(part & (row < lane))
        return crossing(row, lane, n), exp(seen), exp(left)


def _split(x: jax.Array, narrow, count: int) -> list[jax.Array]:
    """x as a sum of ``count`` arrays of the dtype of products, which products sum exactly."""
    parts = []
    for _ in range(count):
        parts.append(x.astype(narrow))
        x = x - parts[-1].astype(x.dtype)
    return parts
