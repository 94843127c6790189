"""How the delta rule is cut in programs on GPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxlinear.pallas import blocks
from jaxlinear.pallas.delta_rule_plan import Plan


@dataclasses.dataclass(frozen=True)
class Layout:
    """``chunk`` tokens; K and V as powers of two, and the channels of a tile of them; the values of which one program goes
    through time, or has the outputs; and the keys of which one has the gradients."""

    plan: Any
    chunk: int
    keys: int
    values: int
    key_tile: int
    value_tile: int
    states_tile: int
    gradient_tile: int

    @property
    def of_gradients(self) -> "Layout":
        """Of the program that has the gradients of some keys: these are its tile."""
        return dataclasses.replace(self, key_tile=self.gradient_tile)

    @property
    def chunks(self) -> int:
        return -(-self.plan.length // self.chunk)


def layout_of(plan: Plan) -> Layout:
    keys, values = power_of_two(plan.keys), power_of_two(plan.values)
    block = blocks.delta_rule_gpu(plan.length, keys, plan.decay == "channel", plan.chunk)
    tiles = min(block.keys, keys), min(block.values, values), min(block.states, values), min(block.gradients, keys)
    return Layout(plan, block.chunk, keys, values, *tiles)


def power_of_two(width: int) -> int:
    """That holds it, and is wide enough for a product."""
    return max(16, 1 << (width - 1).bit_length())


def span(start, size: int) -> Any:
    """Of an axis: all starts are of one type."""
    return pl.ds(jnp.int32(start) if isinstance(start, int) else start, size)


def over_tiles(width: int, tile: int, step: Callable[[Any, Any], Any], carry: Any = ()) -> Any:
    """``carry = step(first channel, carry)`` for each tile of a width, one after the other."""
    if width == tile:
        return step(jnp.int32(0), carry)
    return lax.fori_loop(jnp.int32(0), jnp.int32(width // tile), lambda i, carry: step(i * tile, carry), carry)


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int], layout: Layout) -> jax.Array:
    """The product of two matrices over one axis of each, of the dtype of products, summed in the wide one; float32 is not
    cut to fewer bits."""
    narrow, wide = layout.plan.narrow, layout.plan.wide
    precision = lax.Precision.HIGHEST if narrow == wide else None
    dimensions = ((over[0],), (over[1],)), ((), ())
    return lax.dot_general(
        x.astype(narrow), y.astype(narrow), dimensions, precision=precision, preferred_element_type=wide
    )
