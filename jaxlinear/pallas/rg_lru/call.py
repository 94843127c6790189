"""Calls of the RG-LRU's kernels for TPU: the blocks of their arrays and the order in which these come."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts import memory
from jaxlinear.pallas.parts.lanes import LANES, SUBLANES
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru.bands import Shape

# What an array is, and what of it a block is given.
IN_TIME = "in time"  # [B, T, R]: a group's channels of a block of time
BESIDE = "beside"  # the same: the 8 tokens that end before the block, or the array's first
PER_ROW = "per row"  # [B, R]: a group's channels
MARKS = "marks"  # [B, T] bool, as int32: a block of time
GROUP = "group"  # [n, R] or bands [n, groups, rows, 128]: a group's

_ORDERS: list[Any] = [("parallel",) * (3 - n) + ("arbitrary",) * n for n in range(3)]  # by Order.one_by_one


class Order(NamedTuple):
    """``backwards``: the last block of time is the first. ``one_by_one``: of the grid's axes (groups, B, blocks of time),
    so many from the last on have an order that matters."""

    backwards: bool
    one_by_one: int


def call(
    kernel: Callable[..., None],
    name: str,
    shape: Shape,
    order: Order,
    inputs: list[tuple[jax.Array, str]],
    outputs: list[tuple[tuple[int, ...], Any, str]],
    scratch: list[Any],
    products: int,
    target: Target,
) -> list[jax.Array]:
    """The outputs of ``kernel(shape, *inputs, *outputs, *scratch)``, given by shape, dtype and kind. Arrays in time are
    padded to whole blocks, and cut off again.

    ``products``: how often the kernel multiplies by the blocks of both W_a and W_x or, for their gradients, as much.
    """
    batch, steps = inputs[0][0].shape[0], shape.padded // shape.time
    more = shape.padded - shape.length
    arrays: list[Any] = [_prepared(y, kind, more) for y, kind in inputs]
    shapes: list[Any] = [jax.ShapeDtypeStruct(_as_written(y, kind, shape), dtype) for y, dtype, kind in outputs]
    spec = functools.partial(_spec, shape, lambda t: steps - 1 - t if order.backwards else t)
    numbers = batch * shape.padded * shape.width
    found = pl.pallas_call(
        functools.partial(kernel, shape),
        grid=(shape.width // shape.group, batch, steps),
        in_specs=[spec(y, kind) for y, (_, kind) in zip(arrays, inputs, strict=True)],
        out_specs=[spec(y, kind) for y, (*_, kind) in zip(shapes, outputs, strict=True)],
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=_ORDERS[order.one_by_one], vmem_limit_bytes=memory.VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=numbers * shape.block * 4 * products,
            transcendentals=4 * numbers,
            bytes_accessed=sum(y.size * jnp.dtype(y.dtype).itemsize for y in [*arrays, *shapes]),
        ),
        name=name,
        interpret=target.interpret,
    )(*arrays)
    cut = {IN_TIME: lambda y: y[:, : shape.length], PER_ROW: lambda y: y[:, 0]}
    return [cut.get(kind, lambda y: y)(y) for y, (*_, kind) in zip(found, outputs, strict=True)]


def on_lanes(shape: Shape) -> Any:
    """Scratch for the marks of a block's tokens on all lanes."""
    return pltpu.VMEM((shape.time, LANES), jnp.int32)


def _prepared(y: jax.Array, kind: str, more: int) -> jax.Array:
    if kind in (IN_TIME, BESIDE):
        return jnp.pad(y, ((0, 0), (0, more), (0, 0))) if more else y
    if kind == MARKS:
        return jnp.pad(y.astype(jnp.int32), ((0, 0), (0, more)))[:, None]
    return y[:, None] if kind == PER_ROW else y


def _as_written(y: tuple[int, ...], kind: str, shape: Shape) -> tuple[int, ...]:
    if kind == IN_TIME:
        return y[0], shape.padded, y[2]
    return (y[0], 1, y[1]) if kind == PER_ROW else y


def _spec(shape: Shape, at: Callable[[Any], Any], y: Any, kind: str) -> pl.BlockSpec:
    """``at``: the block of time in a step of the grid."""
    if kind == IN_TIME:
        return pl.BlockSpec((None, shape.time, shape.group), lambda g, b, t: (b, at(t), g))
    if kind == BESIDE:
        before = lambda t: jnp.maximum(at(t) * (shape.time // SUBLANES) - 1, 0)  # noqa: E731
        return pl.BlockSpec((None, SUBLANES, shape.group), lambda g, b, t: (b, before(t), g))
    if kind == PER_ROW:
        return pl.BlockSpec((None, 1, shape.group), lambda g, b, t: (b, 0, g))
    if kind == MARKS:
        return pl.BlockSpec((None, 1, shape.time), lambda g, b, t: (b, 0, at(t)))
    if len(y.shape) == 2:
        return pl.BlockSpec((y.shape[0], shape.group), lambda g, b, t: (0, g))
    return pl.BlockSpec((y.shape[0], None, shape.rows, LANES), lambda g, b, t: (0, g, 0, 0))
