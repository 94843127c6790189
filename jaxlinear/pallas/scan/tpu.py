"""The diagonal scan for TPU: blocks of time streamed through VMEM, double buffered, by the last axis of the grid."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts.lanes import LANES, SUBLANES
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.scan import blocks
from jaxlinear.pallas.scan.plan import Arguments, Plan
from jaxlinear.pallas.scan.tpu_block import Block, Shape


def call(plan: Plan, arguments: Arguments, target: Target) -> list[jax.Array]:
    """The kernel's outputs, in the order of ``Plan.outputs``. Whatever lies beyond T or D in the last blocks is read but
    never written."""
    batch, length, width = arguments.x[0].shape
    time, lanes, rows = blocks.tpu(target.kind, length, width, plan.parts)
    steps = pl.cdiv(length, time)
    inputs, scratch = _inputs(plan, arguments, time, lanes, steps)
    outputs = plan.outputs(arguments, sums=SUBLANES)
    specs = {
        "in_time": _in_time(plan, time, lanes, steps),
        "per_row": _per_row(lanes),
        "sums": pl.BlockSpec((None, SUBLANES, lanes), lambda b, d, t: (b, 0, d)),
    }
    return pl.pallas_call(
        functools.partial(_kernel, plan, Shape(length, time, lanes, rows)),
        grid=(batch, pl.cdiv(width, lanes), steps),
        in_specs=[spec for _, spec in inputs],
        out_specs=[specs[form] for _, form in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=plan.cost(arguments, outputs),
        name=plan.name,
        interpret=target.interpret,
    )(*(y for y, _ in inputs))


def _kernel(plan: Plan, shape: Shape, *refs) -> None:
    Block(plan, shape, refs).run()


def _inputs(plan: Plan, arguments: Arguments, time: int, lanes: int, steps: int):
    """The arrays with their block specs, in the order in which ``Block`` takes them, and the scratch."""
    length = arguments.x[0].shape[1]
    in_time, per_row = _in_time(plan, time, lanes, steps), _per_row(lanes)
    constant = pl.BlockSpec((None, 1, lanes), lambda b, d, t: (0, 0, d))
    inputs = [(y, constant if plan.constant else in_time) for y in arguments.a]
    inputs += [(y, in_time) for y in arguments.x]
    if plan.with_h:
        inputs += [(y, in_time) for y in arguments.h]
        inputs += [(y, _beside(plan, y, time, lanes, steps)) for y in arguments.h]
        inputs += [(y[:, None], per_row) for y in arguments.before]
    inputs += [(y[:, None], per_row) for y in arguments.state]
    if not plan.packed:
        return inputs, []
    starts = jnp.pad(arguments.starts.astype(jnp.int32), ((0, 0), (0, steps * time - length)))
    inputs.append((starts[:, None], pl.BlockSpec((None, 1, time), lambda b, d, t: (b, 0, _at(plan, steps, t)))))
    return inputs, [pltpu.VMEM((time, LANES), jnp.int32)]


def _at(plan: Plan, steps: int, t):
    """The block of time processed in grid step t."""
    return steps - 1 - t if plan.reverse else t


def _in_time(plan: Plan, time: int, lanes: int, steps: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, time, lanes), lambda b, d, t: (b, _at(plan, steps, t), d))


def _per_row(lanes: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, 1, lanes), lambda b, d, t: (b, 0, d))


def _beside(plan: Plan, h: jax.Array, time: int, lanes: int, steps: int) -> pl.BlockSpec:
    """The few rows of h next to the block that include the predecessor of its first row in the direction of h."""
    rows = SUBLANES * max(1, 4 // h.dtype.itemsize)
    last = pl.cdiv(h.shape[1], rows) - 1

    def beside(t):
        block = _at(plan, steps, t)
        if plan.reverse:
            return jnp.maximum(block * (time // rows) - 1, 0)
        return jnp.minimum((block + 1) * (time // rows), last)

    return pl.BlockSpec((None, rows, lanes), lambda b, d, t: (b, beside(t), d))
