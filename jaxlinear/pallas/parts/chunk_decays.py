"""Decays within a chunk, inside kernels: from one token to another, and products of tokens decayed by them.

The rules of ``ops.decay`` hold: no exponent is above 0, and each is a sum of only the log decays that it stands for. Log
decays must be ``finite`` before they are summed: those per head are here, whereas ``channel_decays`` sees to those by key
channel, ``[c, K]``, itself. c is 8 times a power of two.
Arrays are values in registers, float32 (float64 in interpreted kernels), and functions use only what Mosaic compiles.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts.products import dot

GROUP = 8  # tokens of a register


def finite(log_decay: jax.Array) -> jax.Array:
    """-inf cannot be summed: log decays below a floor whose exponential is zero become that floor."""
    return jnp.maximum(log_decay, jnp.asarray(floor(log_decay.dtype), log_decay.dtype))


def times(factor: jax.Array | None, x: Any) -> Any:
    """The product; either may be None for 1. The factor of a head is the same in all its columns, however many."""
    if factor is None or x is None:
        return x if factor is None else factor
    if factor.shape[1] != x.shape[1]:
        factor = factor[:, : x.shape[1] if factor.shape[1] >= x.shape[1] else 1]
    return factor * x


def scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """The product in the dtype of x."""
    return x if factor is None else times(factor, x.astype(factor.dtype)).astype(x.dtype)


def suffix_sums(x: jax.Array) -> jax.Array:
    """``y_i = sum_{j >= i} x_j`` of ``[c, D]``."""
    return _running(x, -1)


def prefix_sums(x: jax.Array, part: int | None = None) -> jax.Array:
    """``y_i = sum_{j <= i} x_j`` of ``[c, D]``; the sums restart every ``part`` tokens, 4 or a multiple of 8."""
    return _running(x, 1, part)


def _running(x: jax.Array, step: int, part: int | None = None) -> jax.Array:
    groups = in_groups(x)
    size = GROUP if part is None else min(part, GROUP)
    place = places(groups) & (size - 1)
    for by in (1, 2, 4):
        if by < size:
            reached = place >= by if step == 1 else place < size - by
            shifted = pltpu.roll(groups, by if step == 1 else GROUP - by, axis=1)
            groups = groups + jnp.where(reached, shifted, jnp.zeros_like(groups))
    last = slice(GROUP - 1, GROUP) if step == 1 else slice(0, 1)
    found: dict[int, jax.Array] = {}
    for n in range(groups.shape[0])[::step]:
        begins = n - step not in found or (part is not None and n * GROUP % part == 0)
        found[n] = groups[n] if begins else groups[n] + found[n - step][last]
    return jnp.concatenate([found[n] for n in range(groups.shape[0])])


class NoDecay:
    """Like the classes below, for no decay: what scales a state or a token is None."""

    by_channel = False
    since_start = until_end = whole = None

    def __init__(self, length: int):
        self._lower = pairs(length)

    def decayed(self, products: jax.Array) -> jax.Array:
        """The result of ``pairwise``, from the products of all pairs; or, from its gradient, that of these products."""
        i, j = self._lower
        return masked(i >= j, products)

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        return [self.decayed(dot(r, columns, (1, 1), wide)) for r in rows]

    def pairwise_gradient(self, rows, columns, d_products, wide) -> tuple[list[jax.Array], jax.Array]:
        """From the gradients of ``pairwise``'s products, those of ``rows`` and of ``columns``."""
        return _back(rows, columns, [self.decayed(d) for d in d_products], wide)


class ByHead:
    """One decay for the whole head: ``since_start``, ``until_end`` ``[c, 1 or c]`` and ``whole`` ``[1, 1 or c]`` as in
    ``ops.decay``, the same in all columns.

    Made from the log decays since the start and until the end, and from ``steps`` ``[c, c]``, G_i - G_j where i >= j and
    arbitrary elsewhere.
    """

    by_channel = False

    def __init__(self, steps: jax.Array, since_start: jax.Array, until_end: jax.Array):
        self._pairs = i, j = pairs(steps.shape[0])
        self.matrix = jnp.exp(jnp.where(i >= j, steps, jnp.full_like(steps, -jnp.inf)))
        self.since_start, self.until_end = jnp.exp(since_start), jnp.exp(until_end)
        self.whole = self.since_start[-1:]

    def pairwise(self, rows: tuple[jax.Array, ...], columns: jax.Array, wide) -> list[jax.Array]:
        """``A_ij = sum_k r_ik columns_jk exp(G_i - G_j)`` for i >= j, zero elsewhere, for each r of ``rows`` ``[c, K]``."""
        return [self.decayed(dot(r, columns, (1, 1), wide)) for r in rows]

    def decayed(self, products: jax.Array) -> jax.Array:
        """As ``NoDecay.decayed``."""
        return self.matrix * products

    def pairwise_gradient(self, rows, columns, d_products, wide) -> tuple[list[jax.Array], jax.Array]:
        """As ``NoDecay.pairwise_gradient``. That of the decay itself is that of ``steps_gradient``."""
        return _back(rows, columns, [self.decayed(d) for d in d_products], wide)

    def steps_gradient(self, products, d_products) -> jax.Array:
        """The gradient of ``G_i - G_j`` ``[c, c]``, from ``pairwise``'s products and their gradients."""
        i, j = self._pairs
        found = [x.astype(d.dtype) * d for x, d in zip(products, d_products, strict=True)]
        return masked(i > j, functools.reduce(operator.add, found))


def by_heads(coarse: jax.Array, fine: jax.Array) -> list[ByHead]:
    """For each head, from the sums of ``head_sums.coarse_and_fine``, ``[n, c]`` each; factors are ``[c, 1]``."""
    columns, found = [x.T for x in (coarse, fine)], []
    for n in range(coarse.shape[0]):
        rows, (first, second) = (x[n : n + 1] for x in (coarse, fine)), (x[:, n : n + 1] for x in columns)
        steps = [x - y for x, y in zip((first, second), rows, strict=True)]
        left = (first[-1:] - first) + (second[-1:] - second)
        found.append(ByHead(steps[0] + steps[1], first + second, left))
    return found


def by_sums(coarse: jax.Array, fine: jax.Array) -> ByHead:
    """``by_heads`` for one head, ``[1, c]`` each; factors are ``[c, c]``: more registers, but matrices are multiplied
    without a broadcast."""
    # A row broadcast to many rows and transposed is each token's number in all columns: cheaper than spreading a column.
    columns = [jnp.broadcast_to(x, (x.shape[1], x.shape[1])).T for x in (coarse, fine)]
    steps = [x - y for x, y in zip(columns, (coarse, fine), strict=True)]
    left = [x[:, -1:] - y for x, y in zip((coarse, fine), columns, strict=True)]
    return ByHead(steps[0] + steps[1], columns[0] + columns[1], left[0] + left[1])


def constant(log_decay: jax.Array, length: int, last: Any) -> ByHead:
    """For a log decay ``[1, 1]`` that is the same for all tokens up to the one with index ``last``, and 0 after it."""
    i, j = (jnp.minimum(x, last).astype(log_decay.dtype) for x in pairs(length))
    return ByHead((i - j) * log_decay, (i + 1) * log_decay, (i[-1:] - i) * log_decay)


def coarse_and_fine(log_decay: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Whole multiples of a unit, ``length`` of which, down to the floor of log decays, have an exact sum; and the rest."""
    dtype = log_decay.dtype
    unit = 2.0 ** math.ceil(math.log2(-floor(dtype) * length / 2 ** (jnp.finfo(dtype).nmant + 1)))
    coarse = jnp.ceil(log_decay * (1 / unit)) * unit
    return coarse, log_decay - coarse


def _back(rows, columns, d_products, wide):
    d_products = [d.astype(columns.dtype) for d in d_products]
    d_rows = [dot(d, columns, (1, 0), wide) for d in d_products]
    return d_rows, sum(dot(d, r, (0, 0), wide) for r, d in zip(rows, d_products, strict=True))


def in_groups(x: jax.Array) -> jax.Array:
    """``[c, D]`` by registers, ``[c / 8, 8, D]``."""
    return x.reshape(-1, GROUP, x.shape[-1])


def places(groups: jax.Array) -> jax.Array:
    """For each number, its token's position in its register."""
    return lax.broadcasted_iota(jnp.int32, groups.shape, 1)


def pairs(length: int) -> tuple[jax.Array, jax.Array]:
    """``[c, c]``: the row index and the column index."""
    i, j = (lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return i, j


def masked(condition: jax.Array, x: jax.Array) -> jax.Array:
    """x where the condition holds, else 0."""
    return jnp.where(condition, x, jnp.zeros_like(x))


def floor(dtype) -> float:
    """The least log decay that is distinguished: its exponential is 0."""
    return -128.0 if jnp.finfo(dtype).bits == 32 else -1024.0
