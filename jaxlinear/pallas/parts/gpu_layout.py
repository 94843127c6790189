"""How matrix states are tiled in GPU programs, and helpers that all of these programs use."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxlinear.pallas.parts import products
from jaxlinear.pallas.parts.channel_decays import to_base_2
from jaxlinear.pallas.parts.chunk_decays import floor


@dataclasses.dataclass(frozen=True)
class Layout:
    """``chunk`` tokens; K and V rounded up to powers of two, and the channels of their tiles; the values that one program
    carries through time or computes outputs for; the keys that one has the gradients of, also the tile of what takes few
    registers; and the tile of values in programs for gradients."""

    plan: Any
    chunk: int
    keys: int
    values: int
    key_tile: int
    value_tile: int
    states_tile: int
    gradient_tile: int
    gradient_value_tile: int

    @property
    def of_gradients(self) -> "Layout":
        """For the program that has the gradients of some keys: these are its tile."""
        return dataclasses.replace(self, key_tile=self.gradient_tile)

    @property
    def of_values(self) -> "Layout":
        """For a program that has gradients with tiles of values other than those of the others."""
        return dataclasses.replace(self, value_tile=self.gradient_value_tile)

    @property
    def chunks(self) -> int:
        return -(-self.plan.length // self.chunk)


def power_of_two(width: int) -> int:
    """The smallest one that holds the width and is wide enough for a product."""
    return max(16, 1 << (width - 1).bit_length())


def span(start, size: int) -> Any:
    """A slice of an axis; all starts have one type."""
    return pl.ds(jnp.int32(start) if isinstance(start, int) else start, size)


def over_tiles(width: int, tile: int, step: Callable[[Any, Any], Any], carry: Any = ()) -> Any:
    """``carry = step(first channel, carry)`` for each tile of a width in turn: a loop that is not unrolled, since otherwise
    the loads of all tiles take registers at once."""
    if width == tile:
        return step(jnp.int32(0), carry)
    return lax.fori_loop(jnp.int32(0), jnp.int32(width // tile), lambda i, carry: step(i * tile, carry), carry)


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int], layout: Layout) -> jax.Array:
    """The product of two matrices over one axis of each, with inputs in the dtype of products, summed in the wide one.
    float32 is not truncated to fewer bits."""
    narrow, wide = layout.plan.narrow, layout.plan.wide
    return products.dot(x.astype(narrow), y.astype(narrow), over, wide)


def times(x: jax.Array | None, y: jax.Array | None) -> Any:
    """The product, with None for 1."""
    return y if x is None else x if y is None else x * y


def scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    return x if factor is None else (x.astype(factor.dtype) * factor).astype(x.dtype)


def exp(x: jax.Array) -> jax.Array:
    """Uses the base-2 exponential of the hardware: Triton's own takes eight instructions."""
    return jnp.exp2(to_base_2(x))


def finite(log_decay: jax.Array) -> jax.Array:
    """As ``chunk_decays.finite``, but Triton's maximum of a NaN and a number is the number."""
    least = jnp.asarray(floor(log_decay.dtype), log_decay.dtype)
    return jnp.where(log_decay < least, least, log_decay)


def crossing(row: jax.Array, lane: jax.Array, n) -> jax.Array:
    """Pairs of tokens whose smallest common part has 2^(n+1) tokens, with the row in its second half."""
    row, lane = row >> n, lane >> n
    return (row == lane + 1) & ((lane & 1) == 0)
