"""Chunked linear attention for TPU: blocks of time are streamed through VMEM, a few heads at once, the states resident.

The forward pass keeps only the states before each block of time for the backward pass, which recomputes those before the
block's chunks.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.linear_attention import blocks
from jaxlinear.pallas.linear_attention.plan import Arguments, Plan
from jaxlinear.pallas.linear_attention.tpu_block import Block, Shape
from jaxlinear.pallas.parts import head_sums, memory
from jaxlinear.pallas.parts.lanes import SUBLANES
from jaxlinear.pallas.parts.target import Target


def call(plan: Plan, arguments: Arguments, target: Target) -> list[jax.Array]:
    """The outputs that ``Plan`` names, in its order."""
    layout = _layout(plan, arguments, target)
    inputs, outputs = _inputs(layout, arguments), _outputs(layout, arguments)
    results = pl.pallas_call(
        functools.partial(_kernel, layout),
        grid=(layout.batch, layout.head_blocks, layout.steps),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory.VMEM_BYTES
        ),
        cost_estimate=_cost(plan, layout, inputs, outputs),
        name=plan.name,
        interpret=target.interpret,
    )(*(x for x, _ in inputs))
    return _finished(layout, results)


class _Layout(NamedTuple):
    plan: Plan
    shape: Shape
    batch: int
    together: int  # heads of a block that are processed at once

    @property
    def steps(self) -> int:
        return pl.cdiv(self.shape.length, self.shape.time)

    @property
    def head_blocks(self) -> int:
        return pl.cdiv(self.plan.heads, self.shape.heads)

    def at(self, t):
        """The block of time processed in grid step t."""
        return self.steps - 1 - t if self.plan.reverse else t

    def in_time(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.shape.time, self.shape.heads * width), lambda b, h, t: (b, self.at(t), h))

    def keys(self) -> pl.BlockSpec:
        if not self.plan.shared:
            return self.in_time(self.plan.key_width)
        return pl.BlockSpec((None, self.shape.time, self.plan.key_width), lambda b, h, t: (b, self.at(t), 0))

    def of_shared(self, x: jax.Array) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """The gradient of what all heads share, one part per block of heads: ``[B, head blocks, T, K]``."""
        shape = x.shape[0], self.head_blocks, *x.shape[1:]
        block = (None, None, self.shape.time, self.plan.key_width)
        return jax.ShapeDtypeStruct(shape, x.dtype), pl.BlockSpec(block, lambda b, h, t: (b, h, self.at(t), 0))

    def rows(self, count: int) -> pl.BlockSpec:
        """For ``[B, head blocks, count, T]``."""
        return pl.BlockSpec((None, None, count, self.shape.time), lambda b, h, t: (b, h, 0, self.at(t)))

    def of_state(self, *shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.shape.heads, *shape), lambda b, h, t: (b, h, 0, 0))

    def before(self) -> pl.BlockSpec:
        state = self.plan.value_width, self.plan.key_width
        return pl.BlockSpec((None, None, self.shape.heads, *state), lambda b, h, t: (b, self.at(t), h, 0, 0))


def _kernel(layout: _Layout, *refs) -> None:
    """Each group of heads begins with a condition. Without one, groups took as much VMEM as all heads at once."""
    of_block = range(layout.shape.heads)
    for first in of_block[:: layout.together]:
        Block(layout.plan, layout.shape, refs, of_block[first : first + layout.together]).run()


def _layout(plan: Plan, arguments: Arguments, target: Target) -> _Layout:
    batch, length, _ = arguments.keys.shape
    size = arguments.keys.dtype.itemsize
    time, chunk, heads = blocks.tpu(
        target.kind, length, plan.heads, plan.side_by_side, plan.decay == "channel", plan.chunk, size
    )
    of_block = together = heads[plan.kind == "gradient"]
    if plan.kind == "gradient" and plan.decay == "channel":
        together = blocks.together(of_block, time, chunk, plan.key_width, plan.value_width, size)
    rows = -(-of_block // SUBLANES) * SUBLANES
    return _Layout(plan, Shape(length, time, chunk, of_block, rows), batch, together)


def _inputs(layout: _Layout, arguments: Arguments):
    """The arrays with their block specs, in the order in which ``Block`` takes them."""
    plan, shape = layout.plan, layout.shape
    keys, values = layout.keys(), layout.in_time(plan.value_width)
    inputs = [(arguments.keys, keys), (arguments.values, values)]
    if arguments.queries is not None:
        inputs.append((arguments.queries, keys))
    if arguments.d_o is not None:
        inputs += [(arguments.d_o, values), (arguments.before, layout.before())]
    if plan.decay == "channel":
        inputs.append((arguments.log_decay, keys))
    elif plan.decay == "scalar":
        inputs.append((_sums(layout, arguments.log_decay.astype(arguments.state.dtype)), layout.rows(2 * shape.rows)))
    elif plan.decay == "constant":
        by_block = _by_block(layout, arguments.log_decay.astype(arguments.state.dtype))
        inputs.append((by_block[:, None], pl.BlockSpec((None, 1, shape.rows), lambda b, h, t: (h, 0, 0))))
    if plan.packed:
        starts = _padded(layout, arguments.starts.astype(jnp.int32), 1)
        runs = jnp.cumsum(starts.reshape(layout.batch, -1, shape.chunk), axis=2).reshape(layout.batch, 1, -1)
        inputs.append((runs, pl.BlockSpec((None, 1, shape.time), lambda b, h, t: (b, 0, layout.at(t)))))
    return [*inputs, (arguments.state, layout.of_state(plan.value_width, plan.key_width))]


def _outputs(layout: _Layout, arguments: Arguments):
    """Shapes with their block specs, the state last."""
    plan, shape, state = layout.plan, layout.shape, arguments.state
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    keys, values = layout.keys(), layout.in_time(plan.value_width)
    outputs = []
    if plan.kind == "forward":
        outputs.append((like(arguments.values), values))
        if plan.keep:
            before = state.shape[0], layout.steps, *state.shape[1:]
            outputs.append((jax.ShapeDtypeStruct(before, state.dtype), layout.before()))
    elif plan.kind == "summary" and plan.decay == "channel":
        kept = jax.ShapeDtypeStruct((layout.batch, plan.heads, 1, plan.key_width), state.dtype)
        outputs.append((kept, layout.of_state(1, plan.key_width)))
    elif plan.kind == "gradient":
        of_keys = [layout.of_shared(x) if plan.shared else (like(x), keys) for x in (arguments.queries, arguments.keys)]
        outputs += [*of_keys, (like(arguments.values), values)]
        if plan.decay == "channel":
            outputs.append((like(arguments.log_decay), keys))
        elif plan.by_head:
            by_block = layout.batch, layout.head_blocks, shape.rows
            time, spec = layout.steps * shape.time, layout.rows(shape.rows)
            if plan.decay == "constant":
                time, spec = (
                    shape.chunk,
                    pl.BlockSpec((None, None, shape.rows, shape.chunk), lambda b, h, t: (b, h, 0, 0)),
                )
            outputs.append((jax.ShapeDtypeStruct((*by_block, time), state.dtype), spec))
    return [*outputs, (like(state), layout.of_state(plan.value_width, plan.key_width))]


def _finished(layout: _Layout, results: list[jax.Array]) -> list[jax.Array]:
    """The results, with the gradient of head decays as ``[B, T, H]``, or ``[H]`` if constant, and a single gradient of what
    all heads share."""
    plan = layout.plan
    if plan.kind == "gradient" and plan.shared:
        of_shared = (jnp.sum(x.astype(results[-1].dtype), axis=1).astype(x.dtype) for x in results[:2])
        results = [*of_shared, *results[2:]]
    if plan.kind != "gradient" or not plan.by_head:
        return results
    *others, rows, state = results
    rows = rows[:, :, : layout.shape.heads].reshape(layout.batch, -1, rows.shape[-1])[:, : plan.heads]
    if plan.decay == "constant":
        return [*others, jnp.sum(rows, axis=(0, 2)), state]
    by_chunk = rows.reshape(*rows.shape[:2], -1, layout.shape.chunk)
    d_log_decay = head_sums.from_last(by_chunk).reshape(rows.shape)
    return [*others, d_log_decay[:, :, : layout.shape.length].swapaxes(1, 2), state]


def _sums(layout: _Layout, log_decay: jax.Array) -> jax.Array:
    """``[B, T, H]`` to ``[B, head blocks, 2 rows, T]``, with time along lanes: those of
    ``head_sums.coarse_and_fine``, one row per head for the first and then for the second."""
    by_head = _padded(layout, log_decay, 1).swapaxes(1, 2)
    parts = head_sums.coarse_and_fine(by_head.reshape(*by_head.shape[:2], -1, layout.shape.chunk))
    return jnp.concatenate([_by_block(layout, x.reshape(by_head.shape), 1) for x in parts], axis=2)


def _by_block(layout: _Layout, x: jax.Array, axis: int = 0) -> jax.Array:
    """Splits heads along ``axis`` into blocks, with rows of zeros up to a whole register."""
    shape, missing = layout.shape, layout.head_blocks * layout.shape.heads - layout.plan.heads
    pad = [(0, 0)] * (x.ndim + 1)
    pad[axis + 1] = 0, shape.rows - shape.heads
    x = jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])
    return jnp.pad(x.reshape(*x.shape[:axis], -1, shape.heads, *x.shape[axis + 1 :]), pad)


def _padded(layout: _Layout, x: jax.Array, axis: int) -> jax.Array:
    """Pads with zeros to whole blocks of time."""
    missing = layout.steps * layout.shape.time - x.shape[axis]
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)])


def _cost(plan: Plan, layout: _Layout, inputs, outputs) -> pl.CostEstimate:
    tokens = layout.batch * layout.shape.length * plan.heads
    size = lambda x: math.prod(x.shape) * jnp.dtype(x.dtype).itemsize  # noqa: E731
    return pl.CostEstimate(
        flops=tokens * plan.products(layout.shape.chunk),
        transcendentals=0 if plan.decay == "none" else tokens * layout.shape.chunk,
        bytes_accessed=sum(size(x) for x, _ in (*inputs, *outputs)),
    )
