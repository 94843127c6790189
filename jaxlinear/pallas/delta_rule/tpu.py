"""The delta rule for TPU: a chunk of time for several heads at once, as the arrays lie in memory, with the states in VMEM.

A block is ``[c, n K]`` of ``[T, H K]``. Arrays with one number per token and head, which are small, are rearranged by
chunks and blocks of heads, ``[B, N, c]`` for each head. State outputs are also where states are carried from chunk to
chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.delta_rule import blocks
from jaxlinear.pallas.delta_rule.plan import Arguments, Plan, size_of
from jaxlinear.pallas.delta_rule.tpu_block import Block, Shape
from jaxlinear.pallas.parts import head_sums, memory
from jaxlinear.pallas.parts.target import Target


def call(plan: Plan, arguments: Arguments, target: Target) -> dict[str, jax.Array]:
    """The kernel's outputs by name, each in the shape of the array that it is or is the gradient of; states as in
    ``Arguments``, including ``transition``, ``[B, H, K, K]``."""
    layout = _Layout(plan, arguments, target)
    inputs, outputs = layout.inputs(), layout.outputs()
    arrays = [array for array, _ in inputs.values()]
    shapes = [shape for shape, _ in outputs.values()]
    found = pl.pallas_call(
        functools.partial(_kernel, layout, (*inputs, *outputs)),
        grid=(layout.batch, layout.groups, layout.chunks),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory.VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=layout.batch * plan.length * plan.heads * plan.products(layout.chunk),
            transcendentals=0,
            bytes_accessed=size_of((arrays, shapes)),
        ),
        name=plan.name,
        interpret=target.interpret,
    )(*arrays)
    return {name: layout.restored(name, x) for name, x in zip(outputs, found, strict=True)}


class _Layout:
    """How the arrays are cut into blocks."""

    def __init__(self, plan: Plan, arguments: Arguments, target: Target):
        self.plan, self.arguments, self.batch = plan, arguments, arguments.k.shape[0]
        self.chunk = blocks.chunk_of(target.kind, plan.length, plan.decay == "channel", plan.chunk)
        self.group = blocks.heads_of(
            target.kind, plan.heads, plan.key_width, plan.value_width, forward=plan.kind == "forward"
        )
        size, by_channel = jnp.dtype(plan.narrow).itemsize, plan.decay == "channel"
        widths, is_gradient = (plan.key_width, plan.value_width), plan.kind == "gradient"
        block = blocks.Heads(self.group, *widths, size, by_channel, plan.terms, is_gradient)
        self.together = max(1, block.together())
        self.chunks, self.groups = pl.cdiv(plan.length, self.chunk), pl.cdiv(plan.heads, self.group)

    def inputs(self) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
        given = self.arguments
        inputs = {
            name: (array, self._wide(array))
            for name in ("q", "k", "v", "d_o")
            if (array := getattr(given, name)) is not None
        }
        inputs["beta"] = self._rows(given.beta)
        if self.plan.decay == "channel":
            inputs["log_decay"] = given.log_decay, self._wide(given.log_decay)
        elif self.plan.decay == "scalar":
            rows, _ = self._rows(given.log_decay)
            inputs["log_decay"] = jnp.stack(head_sums.coarse_and_fine(rows), axis=3), self._rows_spec(2)
        if given.starts is not None:
            starts = self._by_chunk(given.starts.astype(jnp.int32))
            runs = jnp.cumsum(starts, axis=2, dtype=jnp.int32)[:, :, None]
            spec = pl.BlockSpec((None, None, 1, self.chunk), lambda b, h, t: (b, self._at(t), 0, 0))
            inputs["runs"] = runs, spec
        if given.before is not None:
            inputs["before"] = given.before, self._before()
        inputs["state"] = given.state, self._state(given.state)
        return inputs

    def outputs(self) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
        plan, given = self.plan, self.arguments
        state = jax.ShapeDtypeStruct(given.state.shape, plan.wide)
        outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}
        if plan.kind == "forward":
            outputs["o"] = jax.ShapeDtypeStruct(given.v.shape, given.v.dtype), self._wide(given.v)
            if plan.keep:
                before = (self.batch, self.chunks, *given.state.shape[1:])
                outputs["before"] = jax.ShapeDtypeStruct(before, plan.narrow), self._before()
        elif plan.kind == "summary":
            transition = jax.ShapeDtypeStruct((self.batch, plan.heads, plan.key_width, plan.key_width), plan.wide)
            outputs["transition"] = transition, self._state(transition)
        elif plan.kind == "gradient":
            for name in ("q", "k", "v"):
                x = getattr(given, name)
                outputs["d_" + name] = jax.ShapeDtypeStruct(x.shape, x.dtype), self._wide(x)
            rows = (self.batch, self.groups, self.chunks, self.group, self.chunk)
            by_head = jax.ShapeDtypeStruct(rows, plan.wide), self._rows_spec()
            outputs["d_beta"] = by_head
            if plan.decay == "scalar":
                outputs["d_log_decay"] = by_head
            elif plan.decay == "channel":
                x = given.log_decay
                outputs["d_log_decay"] = jax.ShapeDtypeStruct(x.shape, x.dtype), self._wide(x)
        outputs["d_state" if plan.reverse else "final"] = state, self._state(state)
        return outputs

    def restored(self, name: str, x: jax.Array) -> jax.Array:
        """x in the shape of the array that it is or is the gradient of."""
        if x.ndim != 5 or name == "before":
            return x
        if name == "d_log_decay":
            x = head_sums.from_last(x)
        x = x.transpose(0, 2, 4, 1, 3).reshape(self.batch, self.chunks * self.chunk, -1)
        return x[:, : self.plan.length, : self.plan.heads]

    def _rows(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """``[B, T, H]`` -> ``[B, groups, N, n, c]``, with zeros after T and H, which change nothing."""
        x = jnp.pad(x.astype(self.plan.wide), ((0, 0), (0, 0), (0, self.groups * self.group - self.plan.heads)))
        x = self._by_chunk(x)
        x = x.reshape(*x.shape[:3], self.groups, self.group).transpose(0, 3, 1, 4, 2)
        return x, self._rows_spec()

    def _by_chunk(self, x: jax.Array) -> jax.Array:
        """``[B, T, ...]`` -> ``[B, N, c, ...]``"""
        x = jnp.pad(x, ((0, 0), (0, self.chunks * self.chunk - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(self.batch, self.chunks, self.chunk, *x.shape[2:])

    def _at(self, t):
        """The chunk processed in grid step t."""
        return self.chunks - 1 - t if self.plan.reverse else t

    def _wide(self, x) -> pl.BlockSpec:
        width = x.shape[-1] // self.plan.heads * self.group
        return pl.BlockSpec((None, self.chunk, width), lambda b, h, t: (b, self._at(t), h))

    def _rows_spec(self, *parts: int) -> pl.BlockSpec:
        shape = *parts, self.group, self.chunk
        return pl.BlockSpec((None, None, None, *shape), lambda b, h, t: (b, h, self._at(t), *(0 for _ in shape)))

    def _state(self, x) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.group, *x.shape[2:]), lambda b, h, t: (b, h, 0, 0))

    def _before(self) -> pl.BlockSpec:
        shape = (None, None, self.group, self.plan.value_width, self.plan.key_width)
        return pl.BlockSpec(shape, lambda b, h, t: (b, self._at(t), h, 0, 0))


def _kernel(layout: _Layout, names: tuple[str, ...], *refs) -> None:
    """Each group of heads begins with a condition, as those of ``linear_attention_tpu`` do."""
    shape, of_block = Shape(layout.chunk, layout.group), range(layout.group)
    for first in of_block[:: layout.together]:
        heads = of_block[first : first + layout.together]
        Block(layout.plan, shape, dict(zip(names, refs, strict=True)), heads).run()
