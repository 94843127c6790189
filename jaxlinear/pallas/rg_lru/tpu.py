"""The RG-LRU for TPU, gates and recurrence in one kernel each way, made of the two kernels' pieces.

By themselves, the gates (``rg_lru_gates``) write a and u, which the recurrence (``scan``) reads; backward it needs a again
and writes their gradients, which the gates read. Here these stay in VMEM for a block of time: forward, the gates of the
block come first and its scan after them; backward, the gates again, the scan of the gradients, and the gradients of the
gates. Only h is kept between the passes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts.lanes import SUBLANES, fill
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import block, blocks
from jaxlinear.pallas.rg_lru.bands import Bytes, Shape, bands_of, blocks_of, fit, shape_of
from jaxlinear.pallas.rg_lru.call import BESIDE, GROUP, IN_TIME, MARKS, PER_ROW, Order, call, on_lanes
from jaxlinear.pallas.rg_lru.equations import Gates
from jaxlinear.pallas.scan import tpu_block as scan
from jaxlinear.pallas.scan.plan import Plan


class Inputs(NamedTuple):
    """x, kernels, vectors, first: as in ``rg_lru_gates.forward``. ``starts`` ``[B, T]`` bool: where the state before the
    token is forgotten; or None."""

    x: jax.Array
    kernels: jax.Array
    vectors: jax.Array
    first: jax.Array
    starts: jax.Array | None


def forward(inputs: Inputs, state: jax.Array, *, target: Target) -> tuple[jax.Array, jax.Array]:
    """h ``[B, T, R]`` and the last state ``[B, R]``, in the dtype of the vectors. ``state``: before the first token."""
    x, kernels, vectors, first, starts = inputs
    shape, wide = shape_of(x, kernels, _needed_forward(x.dtype.itemsize), target), vectors.dtype
    arrays = [
        (x, IN_TIME),
        (bands_of(kernels.astype(x.dtype), shape), GROUP),
        (vectors, GROUP),
        (first, MARKS),
        (state, PER_ROW),
    ]
    outputs = [(x.shape, wide, IN_TIME), (state.shape, wide, PER_ROW)]
    scratch = [on_lanes(shape), *[pltpu.VMEM((shape.time, shape.group), wide)] * 2]
    h, final = _call("forward", shape, arrays, outputs, scratch, starts, target)
    return h, final


def gradient(
    inputs: Inputs, state: jax.Array, h: jax.Array, d_h: jax.Array, d_final: jax.Array, *, target: Target
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of x, the kernels, the vectors and the state, from those of ``forward``'s outputs; it gave h."""
    x, kernels, vectors, first, starts = inputs
    shape, wide = shape_of(x, kernels, _needed(x.dtype.itemsize), target), vectors.dtype
    bands = bands_of(jnp.concatenate([kernels, kernels.swapaxes(2, 3)]).astype(x.dtype), shape)
    arrays = [
        (x, IN_TIME),
        (d_h, IN_TIME),
        (h, IN_TIME),
        (bands, GROUP),
        (vectors, GROUP),
        (first, MARKS),
        (h, BESIDE),
        (state, PER_ROW),
        (d_final, PER_ROW),
    ]
    outputs = [
        (x.shape, x.dtype, IN_TIME),
        ((2, *bands.shape[1:]), wide, GROUP),
        ((SUBLANES * len(vectors), shape.width), wide, GROUP),
        (state.shape, wide, PER_ROW),
    ]
    of_block = shape.time, shape.group
    scratch = [on_lanes(shape), *[pltpu.VMEM(of_block, wide)] * 6, pltpu.VMEM((2, *of_block), x.dtype)]
    d_x, d_bands, sums, d_state = _call("gradient", shape, arrays, outputs, scratch, starts, target)
    d_vectors = jnp.sum(sums.reshape(len(vectors), SUBLANES, -1), axis=1)
    return d_x, blocks_of(d_bands, shape).astype(kernels.dtype), d_vectors, d_state


def fits(width: int, block: int, size: int) -> bool:
    """Whether VMEM has room for the blocks of ``block`` channels among ``width``, with numbers of ``size`` bytes."""
    return fit(width, block, _needed(size))


def _needed(size: int) -> Bytes:
    """By the gradient; the forward pass needs less. Arrays that are streamed are there twice."""
    wide = max(4, size)
    x, d_h, h, d_x = size, wide, wide, size
    return Bytes(2 * (x + d_h + h + d_x) + 6 * wide + 2 * size, 2 * (4 * size + 2 * wide))


def _needed_forward(size: int) -> Bytes:
    wide = max(4, size)
    return Bytes(2 * (size + wide) + 2 * wide, 2 * 2 * size)


def _call(kind: str, shape: Shape, inputs, outputs, scratch, starts, target: Target) -> list[jax.Array]:
    """``starts``, if there are any, are the last input and have the last scratch."""
    backwards, packed = kind == "gradient", starts is not None
    plan = Plan(1, reverse=backwards, lagged=backwards, emit=True, constant=False, packed=packed)
    if packed:
        inputs, scratch = [*inputs, (starts, MARKS)], [*scratch, on_lanes(shape)]
    name = "_".join(["rg_lru", kind, *(["packed"] if packed else [])])
    order = Order(backwards, one_by_one=2 if backwards else 1)
    kernel = functools.partial(_gradient if backwards else _forward, plan)
    return call(kernel, name, shape, order, inputs, outputs, scratch, 3 if backwards else 1, target)


def _forward(plan: Plan, shape: Shape, x, bands, vectors, first, state, *rest) -> None:
    starts, rest = (rest[:1], rest[1:]) if plan.packed else ((), rest)
    h, final, marks, a, u, *resets = rest
    block.forward(shape, x, bands, vectors, first, marks, a, u)
    scan.Block(plan, _scan_shape(shape), (a, u, state, *starts, h, final, *resets)).run()


def _gradient(plan: Plan, shape: Shape, x, d_h, h, bands, vectors, first, beside, state, d_final, *rest) -> None:
    starts, rest = (rest[:1], rest[1:]) if plan.packed else ((), rest)
    d_x, d_bands, sums, d_state, marks, a, r, i, q, d_a, d_u, d_z, *resets = rest
    gradients = block.Gradients(d_bands, sums, d_z, of_x=d_u)  # d_u is read before x's part takes its place
    gradients.begin()
    fill(marks, first)

    def again(at):
        for tile in shape.tiles:
            gates = block.of_tokens(x, bands, vectors, at, tile)
            for ref, y in ((a, gates.a), (r, gates.r), (i, gates.i), (q, gates.q)):
                ref[at, tile.lanes] = y

    block.each(shape.time, again)
    if shape.padded != shape.length:  # the scan leaves out the tokens beyond T, which are in the block that is first

        @pl.when(pl.program_id(2) == 0)
        def _():
            d_a[...] = jnp.zeros_like(d_a)
            d_u[...] = jnp.zeros_like(d_u)

    refs = a, d_h, h, beside, state, d_final, *starts, d_u, d_a, d_state, *resets
    scan.Block(plan, _scan_shape(shape), refs).run()

    def rows(at):
        is_first = marks[at] > 0
        for tile in shape.tiles:
            of_tile = (ref[at, tile.lanes] for ref in (r, i, a, q))
            gates = Gates(*of_tile, x[at, tile.lanes].astype(a.dtype))
            gradients.collect(gates, d_a[at, tile.lanes], d_u[at, tile.lanes], is_first, vectors, at, tile)

    block.each(shape.time, rows)
    gradients.multiply(shape, x, bands, d_x)


def _scan_shape(shape: Shape) -> scan.Shape:
    return scan.Shape(shape.length, shape.time, shape.group, blocks.SCAN_ROWS)
