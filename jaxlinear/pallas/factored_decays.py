"""Decays of key channels within a chunk where none is strong, inside kernels: the products of its pairs are one product.

    exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j),   i >= j

A factor of a token on the other side of r is at least 1, and bounded by what the tokens between decay by: those of a whole
chunk, r being its end (``Factored``), or of a part, r being the middle of two parts (``FactoredInParts``), of which no
channel decays by more than ``LIMIT``; and only in bfloat16: it has the exponents of float32, and its own rounding is above
that of the differences of sums that are taken here.
``channel_decays.ByChannel`` has all others, and ``each_way`` chooses.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlinear.pallas.channel_decays import ByChannel, ByLevels, to_base_2
from jaxlinear.pallas.chunk_decays import dot, masked, pairs, prefix_sums, with_same

LIMIT = 80 * math.log(2)  # of a channel in a chunk or part; 2^80 leaves 2^47 for what it multiplies
PART = 16  # tokens of a part


def each_way(log_decays: list[jax.Array], narrow, wide, work: Callable[[type], None]) -> None:
    """Calls ``work`` inside a kernel with the class for these chunks ``[c, K]``, the products being of dtype ``narrow``."""
    if not takes(narrow, wide):
        work(ByChannel)
        return
    whole = within(log_decays)
    pl.when(whole)(functools.partial(work, Factored))

    @pl.when(~whole)
    def _():
        if log_decays[0].shape[0] < 2 * PART:
            work(ByChannel)
            return
        in_parts = within(log_decays, PART)
        pl.when(in_parts)(functools.partial(work, FactoredInParts))
        pl.when(~in_parts)(functools.partial(work, ByChannel))


def takes(narrow, wide) -> bool:
    """Whether products are of a dtype that has the exponents of the sums, and fewer digits."""
    narrow, wide = jnp.finfo(narrow), jnp.finfo(wide)
    return narrow.nexp == wide.nexp and narrow.nmant < wide.nmant


def within(log_decays: list[jax.Array], part: int | None = None) -> jax.Array:
    """Whether no channel decays by more than ``LIMIT``: in any of these chunks ``[c, K]``, or of their parts; a scalar."""
    totals = [jnp.sum(x.reshape(-1, part or x.shape[0], x.shape[1]), axis=1) for x in log_decays]
    return jnp.min(functools.reduce(jnp.minimum, totals)) >= -LIMIT


class Factored:
    """As ``channel_decays.ByChannel``, of decays that are weak in the chunk."""

    by_channel = True

    def __init__(self, log_decay: jax.Array):
        sums = prefix_sums(to_base_2(log_decay))
        last = sums[-1:]
        self.since_start, self.until_end, self.whole = jnp.exp2(sums), jnp.exp2(last - sums), jnp.exp2(last)
        self._row = self.since_start * jnp.exp2(-last)
        self._pairs = pairs(log_decay.shape[0])

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        i, j = self._pairs
        left = _times(self.until_end, columns)
        # Of j > i there may be infinities, which are not taken.
        return [masked(i >= j, dot(_times(self._row, r), left, (1, 1), wide)) for r in rows]

    def pairwise_gradient(self, rows, columns, d_products, wide) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        i, j = self._pairs
        left, d_rows, of_columns = _times(self.until_end, columns), [], []
        for r, d in zip(rows, d_products, strict=True):
            d = masked(i > j, d).astype(columns.dtype)
            d_rows.append(self._row * dot(d, left, (1, 0), wide))
            of_columns.append(dot(d, _times(self._row, r), (0, 0), wide))
        return with_same(self._pairs, rows, columns, d_products, d_rows, self.until_end * sum(of_columns))


class FactoredInParts(ByLevels):
    """As ``channel_decays.ByChannel``, of decays that are weak in parts of ``PART`` tokens: two factors in two parts, and
    the levels of halves, quarters, ... above."""

    def __init__(self, log_decay: jax.Array):
        seen = prefix_sums(to_base_2(log_decay), 2 * PART).reshape(-1, 2 * PART, log_decay.shape[1])
        since_middle = seen - seen[:, PART - 1 : PART]
        self._row, self._column = jnp.exp2(since_middle), jnp.exp2(-since_middle)
        super().__init__(seen, seen[:, -1:] - seen)

    def _near_products(self, row, columns, apart, wide) -> jax.Array:
        return dot(self._times(self._row, row), self._times(self._column, columns), (1, 1), wide)

    def _near_gradients(self, row, columns, d_products, apart, wide) -> tuple[jax.Array, jax.Array]:
        i, j = self._pairs
        d = masked((i > j) & (apart < 2 * PART), d_products).astype(columns.dtype)
        d_row = dot(d, self._times(self._column, columns), (1, 0), wide)
        d_columns = dot(d, self._times(self._row, row), (0, 0), wide)
        return self._row.reshape(d_row.shape) * d_row, self._column.reshape(d_row.shape) * d_columns

    def _times(self, factor: jax.Array, x: jax.Array) -> jax.Array:
        return _times(factor.reshape(x.shape), x)


def _times(factor: jax.Array, x: jax.Array) -> jax.Array:
    return (factor * x.astype(factor.dtype)).astype(x.dtype)
