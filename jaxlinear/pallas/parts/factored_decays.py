"""Decays of key channels within a chunk, inside kernels, in bfloat16: those of near tokens are two factors of one product.

    exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j),   i >= j

If a token is on the other side of r, its factor is at least 1, and bounded by the decay of the tokens in between: those of
a whole chunk, where r is its end (``Factored``), or of a part, where r is the middle of two parts (``FactoredInParts`` and,
with half as many tokens, ``FactoredInSmallParts``). No channel may decay by more than ``LIMIT`` there. For all others,
``FactoredInFours`` bounds the decays themselves. Only bfloat16 uses this: it has the exponents of float32, and its own
rounding exceeds that of the differences of sums taken here. ``channel_decays.ByChannel`` handles other dtypes, and
``each_way`` chooses.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlinear.pallas.parts.channel_decays import (
    ByChannel,
    ByLevels,
    Gradients,
    last_counts,
    to_base_2,
    with_decays,
)
from jaxlinear.pallas.parts.chunk_decays import (
    GROUP,
    in_groups,
    masked,
    pairs,
    places,
    prefix_sums,
    scaled,
    times,
)
from jaxlinear.pallas.parts.products import dot, dot_terms, terms

LEAST = 24  # bits, as float32 has
LIMIT = 80 * math.log(2)  # for a channel in a chunk or part; 2^80 leaves 2^47 for what it multiplies


def each_way(log_decays: list[jax.Array], narrow, wide, work: Callable[[type], None]) -> None:
    """Calls ``work`` inside a kernel with the class for these chunks ``[c, K]``. Products have the dtype ``narrow``."""
    if not takes(narrow, wide):
        work(ByChannel)
        return
    tokens = log_decays[0].shape[0]
    in_parts = [way for way in (FactoredInParts, FactoredInSmallParts) if 2 * way.part <= tokens]
    _first_within([Factored, *in_parts, FactoredInFours], log_decays, work)


def _first_within(ways: "list[type[Factored | FactoredInParts]]", log_decays: list[jax.Array], work) -> None:
    way, *others = ways
    if not others:
        work(way)
        return
    weak = within(log_decays, way.part)
    pl.when(weak)(functools.partial(work, way))
    pl.when(~weak)(functools.partial(_first_within, others, log_decays, work))


def takes(narrow, wide) -> bool:
    """Whether products have a dtype with the exponents of the sums but fewer digits."""
    narrow, wide = jnp.finfo(narrow), jnp.finfo(wide)
    return narrow.nexp == wide.nexp and narrow.nmant < wide.nmant


def within(log_decays: list[jax.Array], part: int | None = None) -> jax.Array:
    """Whether no channel decays by more than ``LIMIT`` in any of these chunks ``[c, K]``, or of their parts; a scalar."""
    totals = [jnp.sum(x.reshape(-1, part or x.shape[0], x.shape[1]), axis=1) for x in log_decays]
    return jnp.min(functools.reduce(jnp.minimum, totals)) >= -LIMIT


class Factored:
    """As ``channel_decays.ByChannel``, for decays that are weak in the chunk."""

    by_channel = True
    part = None

    def __init__(self, log_decay: jax.Array):
        sums = prefix_sums(to_base_2(log_decay))
        last = sums[-1:]
        self._row, self._until_end, self.whole = jnp.exp2(sums - last), jnp.exp2(last - sums), jnp.exp2(last)
        self._pairs = pairs(log_decay.shape[0])

    def from_start(self, x: jax.Array, factor: jax.Array | None) -> jax.Array:
        return times(factor, self.whole * (self._row * x.astype(self._row.dtype))).astype(x.dtype)

    def to_end(self, x: jax.Array, factor: jax.Array | None) -> jax.Array:
        return scaled(x, times(factor, self._until_end))

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        i, j = self._pairs
        left = scaled(columns, self._until_end)
        # For j > i there may be infinities, which are masked.
        return [masked(i >= j, dot(scaled(r, self._row), left, (1, 1), wide)) for r in rows]

    def gradients(self, rows, columns, d_products, outer, last, wide, count=1) -> Gradients:
        i, j = self._pairs
        left, of_rows, of_columns = scaled(columns, self._until_end), [], []
        for r, d, n in zip(rows, d_products, last_counts(count, rows), strict=True):
            d = terms(masked(i > j, d), columns.dtype, n)
            of_rows.append(dot_terms(d, (left,), (1, 0), wide))
            of_columns.append(dot_terms(d, (scaled(r, self._row),), (0, 0), wide))
        outer_rows, outer_columns = outer
        d_rows = [self._row * (x + self.whole * y) for x, y in zip(of_rows, outer_rows, strict=True)]
        d_columns = self._until_end * (sum(of_columns) + outer_columns)
        ended = scaled(columns.astype(wide), self._until_end) * outer_columns
        return with_decays(self._pairs, rows, columns, d_products, (d_rows, d_columns), ended, last)


class FactoredInParts(ByLevels):
    """As ``channel_decays.ByChannel``, for decays that are weak in parts of ``part`` tokens: two factors within two parts,
    and the levels of halves, quarters, ... above."""

    part = 16

    def __init__(self, log_decay: jax.Array):
        row, totals = self._since_middle(to_base_2(log_decay))
        row = row.reshape(log_decay.shape)
        self._row, self._column = jnp.exp2(row), jnp.exp2(-row)
        first, second = (jnp.exp2(jnp.broadcast_to(x, (x.shape[0], GROUP, x.shape[2]))) for x in totals)
        super().__init__((self._row, self._column), (list(first), list(second)), list(first * second))

    def _since_middle(self, log_decay: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The sums of a token's log decays since the middle of its two parts, less those until it ``[c, K]``; and the total
        of each first and of each second part, ``[n, 1, K]``."""
        seen = prefix_sums(log_decay, self.part).reshape(-1, 2, self.part, log_decay.shape[1])
        first, second = seen[:, 0], seen[:, 1]
        totals = first[:, -1:], second[:, -1:]
        return jnp.stack([first - totals[0], second], axis=1), totals

    def _near_products(self, rows, columns, apart, wide) -> list[jax.Array]:
        left = scaled(columns, self._column)
        return [dot(scaled(r, self._row), left, (1, 1), wide) for r in rows]

    def _near_gradients(self, row, columns, d_products, apart, wide, count) -> tuple[jax.Array, jax.Array]:
        d = terms(masked(apart < 2 * self.part, d_products[0]), columns.dtype, count)
        d_row = dot_terms(d, (scaled(columns, self._column),), (1, 0), wide)
        d_columns = dot_terms(d, (scaled(row, self._row),), (0, 0), wide)
        return d_row, d_columns

    def _with_near(self, near, far, side) -> jax.Array:
        return self._own[side] * (near + far)


class FactoredInSmallParts(FactoredInParts):
    """One more level. Gates bounded by e^-6.9 per token can use nothing else."""

    part = 8


class FactoredInFours(FactoredInParts):
    """One more level, for any decay. One of less than ``2^-LEAST`` from a token to the next, which would not change a 1 in
    float32, counts as that much. Factors are then at most 2^96, which leaves 2^31 for what they multiply."""

    part = 4

    def _since_middle(self, log_decay: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        bounded = jnp.maximum(log_decay, jnp.asarray(-LEAST, log_decay.dtype))
        seen = in_groups(prefix_sums(bounded, self.part))
        totals = seen[:, self.part - 1 : self.part], seen[:, -1:]
        return seen - masked(places(seen) < self.part, jnp.broadcast_to(totals[0], seen.shape)), totals
