"""Decays of key channels within a chunk in which none is strong, inside kernels: the products of its pairs are one product.

    exp(G_i - G_j) = exp(G_i - G_end) exp(G_end - G_j),   i >= j

The first factor is at least 1, and bounded by what the whole chunk decays by, so only chunks that decay by no more than
``LIMIT`` are taken (``within``), and only in bfloat16: it has the exponents of float32, and its own rounding is above that
of the differences of sums that are taken here. ``channel_decays`` has all others.
"""

import math

import jax
import jax.numpy as jnp

from jaxlinear.pallas.chunk_decays import dot, masked, pairs, prefix_sums, with_same

LIMIT = 80 * math.log(2)  # of a channel in a chunk; 2^80 leaves 2^47 for what it multiplies


def takes(narrow, wide) -> bool:
    """Whether products are of a dtype that has the exponents of the sums, and fewer digits."""
    narrow, wide = jnp.finfo(narrow), jnp.finfo(wide)
    return narrow.nexp == wide.nexp and narrow.nmant < wide.nmant


def within(log_decays: list[jax.Array]) -> jax.Array:
    """Whether no channel of these chunks ``[c, K]`` decays by more than ``LIMIT``; a scalar."""
    totals = [jnp.sum(x, axis=0, keepdims=True) for x in log_decays]
    least = totals[0]
    for total in totals[1:]:
        least = jnp.minimum(least, total)
    return jnp.min(least) >= -LIMIT


class Factored:
    """As ``channel_decays.ByChannel``."""

    by_channel = True

    def __init__(self, log_decay: jax.Array):
        sums = prefix_sums(log_decay * jnp.asarray(1 / math.log(2), log_decay.dtype))  # to the base of the hardware
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


def _times(factor: jax.Array, x: jax.Array) -> jax.Array:
    return (factor * x.astype(factor.dtype)).astype(x.dtype)
