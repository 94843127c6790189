"""The arithmetic of the RG-LRU's gates in one block of its kernels for TPU; ``rg_lru_equations`` has the equations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxlinear.pallas.parts.lanes import SUBLANES, fill
from jaxlinear.pallas.rg_lru import blocks
from jaxlinear.pallas.rg_lru.bands import Shape, Tile
from jaxlinear.pallas.rg_lru.equations import LOG2_E, Gates, one_minus_square

_LARGEST_POWER = 60.0


def of_tokens(x, bands, vectors, at, tile: Tile) -> Gates:
    """``at``: which tokens of the block."""
    wide = vectors.dtype
    reached = x[at, tile.reached]

    def inverse_gate(n):
        """1 + exp(-z), at most 2^60, where a gate is 1e-18: the reciprocal of two is that of their product."""
        z = _dot(reached, _band(bands, n, tile), 0, wide) + vectors[n : n + 1, tile.lanes]
        return 1 + jnp.exp2(jnp.minimum(z * -LOG2_E, _LARGEST_POWER))

    for_r, for_i = inverse_gate(0), inverse_gate(1)
    inverse = 1 / (for_r * for_i)
    r, i = inverse * for_i, inverse * for_r
    log2_a = r * (vectors[2:3, tile.lanes] * LOG2_E)
    a = jnp.exp2(log2_a)
    return Gates(r, i, a, one_minus_square(log2_a, a), x[at, tile.lanes].astype(wide))


def forward(shape: Shape, x, bands, vectors, first, marks, a, u) -> None:
    """Writes the ``first`` tokens to ``marks``, and a and u."""
    fill(marks, first)

    def rows(at):
        is_first = marks[at] > 0
        for tile in shape.tiles:
            gates = of_tokens(x, bands, vectors, at, tile)
            a[at, tile.lanes] = gates.a
            u[at, tile.lanes] = gates.input(_on_tile(is_first, tile))

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
        of_gates = gates.gradients(vectors[2:3, tile.lanes], d_a, d_u, _on_tile(is_first, tile))
        of_r, of_i, of_rate, of_x = of_gates
        for n, y in enumerate((of_r, of_i, of_rate)):
            eights = jnp.sum(y.reshape(-1, SUBLANES, y.shape[1]), axis=0)
            self.sums[n * SUBLANES : (n + 1) * SUBLANES, tile.lanes] += eights
        for n, y in enumerate((of_r, of_i)):
            self.d_z[n, at, tile.lanes] = y.astype(self.d_z.dtype)
        self.of_x[at, tile.lanes] = of_x

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
    rows = min(time, blocks.ROWS)

    def step(i, carry):
        body(pl.ds(pl.multiple_of(i.astype(jnp.int32) * rows, rows), rows))
        return carry

    lax.fori_loop(0, time // rows, step, jnp.int32(0))


def _on_tile(is_first: jax.Array, tile: Tile) -> jax.Array:
    """``is_first``: of the tokens, on 128 lanes."""
    return is_first[:, : tile.width]


def _band(bands, n: int, tile: Tile) -> jax.Array:
    return bands[n, tile.rows, : tile.width]


def _dot(x: jax.Array, y: jax.Array, summed: int, wide) -> jax.Array:
    """``x y`` if ``summed`` is 0, ``x^T y`` if it is 1."""
    # float32 uses the same precision as other products with parameters; for bfloat16 Mosaic accepts only the default.
    precision = None if x.dtype == wide else lax.Precision.DEFAULT
    dimensions = ((1 - summed,), (0,)), ((), ())
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=wide)
