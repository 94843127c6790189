"""The arithmetic of the RG-LRU's gates in one block of its kernels for TPU.

    r = sigmoid(z_r),   i = sigmoid(z_i),   a = exp(rate r),   u = w i x

with w = sqrt(q) and q = 1 - a^2, but for the first token of a document, whose w is 1. Backward,

    dq = du i x / max(2 w, 1 / LARGEST_SLOPE),    dlog a = a (da - 2 a dq),    drate = sum dlog a r
    dz_r = dlog a rate r (1 - r),    dz_i = du w x i (1 - i),    dx = du w i + dz_r W_a^T + dz_i W_x^T,    dW = x^T dz

and dq = 0 for the first token of a document. Powers are of 2, which is what a TPU computes, and in float32 q is a series in
log a where a is close to 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxlinear.pallas import blocks
from jaxlinear.pallas.lanes import SUBLANES, fill
from jaxlinear.pallas.rg_lru_bands import Shape, Tile

LARGEST_SLOPE = 1000.0  # of the square root: its own grows without bound as a -> 1
_LOG2_E = math.log2(math.e)
_LARGEST_POWER = 60.0
_LEAST = 1e-30  # of what a reciprocal root is taken of
_NEAR = 1 / 24  # -log2 a up to which 1 - a^2 is a series: with a product it would have lost 4 of 24 digits there


class Gates(NamedTuple):
    """Of some tokens and a tile, in the dtype to compute in."""

    r: jax.Array
    i: jax.Array
    a: jax.Array
    q: jax.Array
    x: jax.Array

    def weight(self, is_first: jax.Array) -> jax.Array:
        return _unless_first(is_first, self.q * self._inverse_root(), 1)

    def slope(self) -> jax.Array:
        """Of the root."""
        return jnp.minimum(self._inverse_root() / 2, LARGEST_SLOPE)

    def _inverse_root(self) -> jax.Array:
        return lax.rsqrt(jnp.maximum(self.q, _LEAST))


def of_tokens(x, bands, vectors, at, tile: Tile) -> Gates:
    """``at``: which tokens of the block."""
    wide = vectors.dtype
    reached = x[at, tile.reached]

    def inverse_gate(n):
        """1 + exp(-z), at most 2^60, where a gate is 1e-18: the reciprocal of two is that of their product."""
        z = _dot(reached, _band(bands, n, tile), 0, wide) + vectors[n : n + 1, tile.lanes]
        return 1 + jnp.exp2(jnp.minimum(z * -_LOG2_E, _LARGEST_POWER))

    for_r, for_i = inverse_gate(0), inverse_gate(1)
    inverse = 1 / (for_r * for_i)
    r, i = inverse * for_i, inverse * for_r
    log2_a = r * (vectors[2:3, tile.lanes] * _LOG2_E)
    a = jnp.exp2(log2_a)
    return Gates(r, i, a, _one_minus_square(log2_a, a), x[at, tile.lanes].astype(wide))


def forward(shape: Shape, x, bands, vectors, first, marks, a, u) -> None:
    """Writes the ``first`` tokens to ``marks``, and a and u."""
    fill(marks, first)

    def rows(at):
        is_first = marks[at] > 0
        for tile in shape.tiles:
            gates = of_tokens(x, bands, vectors, at, tile)
            a[at, tile.lanes] = gates.a
            u[at, tile.lanes] = gates.weight(is_first) * (gates.i * gates.x)

    each(shape.time, rows)


class Gradients(NamedTuple):
    """Where gradients are collected: those of the bands; ``sums`` of b_a's, b_x's and the rate's, over 8 rows each; and, of
    a block, ``d_z`` of z_r and z_i, and ``of_x``, the part of x's that is not theirs."""

    d_bands: Any
    sums: Any
    d_z: Any
    of_x: Any

    def begin(self) -> None:
        """Clears the sums over all blocks of a group before its first."""

        @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
        def _():
            for ref in (self.d_bands, self.sums):
                ref[...] = jnp.zeros_like(ref)

    def collect(
        self, gates: Gates, d_a: jax.Array, d_u: jax.Array, is_first: jax.Array, vectors, at, tile: Tile
    ) -> None:
        """Those of some tokens, given those of their a and u."""
        r, i, a = gates.r, gates.i, gates.a
        ix, d_ix = i * gates.x, d_u * gates.weight(is_first)
        d_q = _unless_first(is_first, d_u * ix * gates.slope(), 0)
        of_rate = a * (d_a - 2 * a * d_q) * r
        of_r = of_rate * vectors[2:3, tile.lanes] * (1 - r)
        of_i = d_ix * ix * (1 - i)
        for n, y in enumerate((of_r, of_i, of_rate)):
            eights = jnp.sum(y.reshape(-1, SUBLANES, y.shape[1]), axis=0)
            self.sums[n * SUBLANES : (n + 1) * SUBLANES, tile.lanes] += eights
        for n, y in enumerate((of_r, of_i)):
            self.d_z[n, at, tile.lanes] = y.astype(self.d_z.dtype)
        self.of_x[at, tile.lanes] = d_ix * i

    def multiply(self, shape: Shape, x, bands, d_x) -> None:
        """The block's ``d_x``, and what it adds to ``d_bands``. The last two of the ``bands`` are those of transposed
        blocks."""
        for tile in shape.tiles:
            total = self.of_x[:, tile.lanes]
            for n in range(2):
                total = total + _dot(self.d_z[n, :, tile.reached], _band(bands, 2 + n, tile), 0, total.dtype)
                of_band = _dot(x[:, tile.reached], self.d_z[n, :, tile.lanes], 1, total.dtype)
                self.d_bands[n, tile.rows, : tile.width] += of_band
            d_x[:, tile.lanes] = total.astype(d_x.dtype)


def each(time: int, body: Callable[[Any], None]) -> None:
    """``body`` for as many tokens at a time as registers hold; positions have 32 bits even under jax_enable_x64."""
    rows = min(time, blocks.RG_LRU_ROWS)

    def step(i, carry):
        body(pl.ds(pl.multiple_of(i.astype(jnp.int32) * rows, rows), rows))
        return carry

    lax.fori_loop(0, time // rows, step, jnp.int32(0))


def _unless_first(is_first: jax.Array, y: jax.Array, other: float) -> jax.Array:
    """``is_first``: of the tokens, on 128 lanes."""
    return jnp.where(is_first[:, : y.shape[1]], jnp.full_like(y, other), y)


def _one_minus_square(log2_a: jax.Array, a: jax.Array) -> jax.Array:
    if a.dtype != jnp.float32:
        return -jnp.expm1(2 * math.log(2) * log2_a)  # which is not compiled
    series = jnp.zeros_like(a)
    for n in reversed(range(1, 5)):  # -(exp(y) - 1) for y = 2 log a
        series = log2_a * (series - (2 * math.log(2)) ** n / math.factorial(n))
    return jnp.where(log2_a > -_NEAR, series, 1 - a * a)


def _band(bands, n: int, tile: Tile) -> jax.Array:
    return bands[n, tile.rows, : tile.width]


def _dot(x: jax.Array, y: jax.Array, summed: int, wide) -> jax.Array:
    """``x y`` if ``summed`` is 0, ``x^T y`` if it is 1."""
    # float32 uses the same precision as other products with parameters; for bfloat16 Mosaic accepts only the default.
    precision = None if x.dtype == wide else lax.Precision.DEFAULT
    dimensions = ((1 - summed,), (0,)), ((), ())
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=wide)
