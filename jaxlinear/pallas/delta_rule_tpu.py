"""The delta rule for TPU: a chunk of time of several heads at once, as the arrays lie in memory, the states in VMEM.

A block is ``[c, n K]`` of ``[T, H K]``. What has one number a token and head is laid by chunks and blocks of heads,
``[B, N, c]`` for each head: it is small. The outputs of states are where they are carried from chunk to chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas import blocks, delta_rule_chunk
from jaxlinear.pallas.channel_decays import ByChannel
from jaxlinear.pallas.chunk_decays import NoDecay, by_heads, finite, suffix_sums
from jaxlinear.pallas.delta_rule_plan import Arguments, Plan, size_of
from jaxlinear.pallas.linear_attention_chunk import Chunk, Documents
from jaxlinear.pallas.target import Target

Refs = dict[str, Any]


def call(plan: Plan, arguments: Arguments, target: Target) -> dict[str, jax.Array]:
    """The kernel's outputs by name, of the shapes of what they are or are the gradients of; states as ``Arguments``
    has them, ``transition`` among them ``[B, H, K, K]``."""
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
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.VMEM_BYTES
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
    """How the arrays are cut in blocks."""

    def __init__(self, plan: Plan, arguments: Arguments, target: Target):
        self.plan, self.arguments, self.batch = plan, arguments, arguments.k.shape[0]
        self.chunk = blocks.delta_rule_chunk(target.kind, plan.length, plan.decay == "channel", plan.chunk)
        self.group = blocks.delta_rule_heads(target.kind, plan.heads, plan.keys, plan.values)
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
            inputs["log_decay"] = self._rows(given.log_decay)
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
            transition = jax.ShapeDtypeStruct((self.batch, plan.heads, plan.keys, plan.keys), plan.wide)
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
        """In the shape of what it is or is the gradient of."""
        if x.ndim != 5 or name == "before":
            return x
        x = x.transpose(0, 2, 4, 1, 3).reshape(self.batch, self.chunks * self.chunk, -1)
        return x[:, : self.plan.length, : self.plan.heads]

    def _rows(self, x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """``[B, T, H]`` -> ``[B, groups, N, n, c]``, with zeros behind T and H, which change nothing."""
        x = jnp.pad(x.astype(self.plan.wide), ((0, 0), (0, 0), (0, self.groups * self.group - self.plan.heads)))
        x = self._by_chunk(x)
        x = x.reshape(*x.shape[:3], self.groups, self.group).transpose(0, 3, 1, 4, 2)
        return x, self._rows_spec()

    def _by_chunk(self, x: jax.Array) -> jax.Array:
        """``[B, T, ...]`` -> ``[B, N, c, ...]``"""
        x = jnp.pad(x, ((0, 0), (0, self.chunks * self.chunk - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(self.batch, self.chunks, self.chunk, *x.shape[2:])

    def _at(self, t):
        """The chunk that is taken in the grid's step t."""
        return self.chunks - 1 - t if self.plan.reverse else t

    def _wide(self, x) -> pl.BlockSpec:
        width = x.shape[-1] // self.plan.heads * self.group
        return pl.BlockSpec((None, self.chunk, width), lambda b, h, t: (b, self._at(t), h))

    def _rows_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, self.group, self.chunk), lambda b, h, t: (b, h, self._at(t), 0, 0))

    def _state(self, x) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.group, *x.shape[2:]), lambda b, h, t: (b, h, 0, 0))

    def _before(self) -> pl.BlockSpec:
        shape = (None, None, self.group, self.plan.values, self.plan.keys)
        return pl.BlockSpec(shape, lambda b, h, t: (b, self._at(t), h, 0, 0))


def _kernel(layout: _Layout, names: tuple[str, ...], *refs) -> None:
    Block(layout, dict(zip(names, refs, strict=True))).run()


class Block:
    """Reads and writes the refs of one chunk of a block of heads."""

    def __init__(self, layout: _Layout, refs: Refs):
        self.plan, self.refs = layout.plan, refs
        self.chunk, self.heads = layout.chunk, range(layout.group)
        step = pl.program_id(2)
        self.is_first = step == 0
        behind = layout.plan.length - layout._at(step) * layout.chunk
        self.valid = None if layout.plan.length % layout.chunk == 0 else behind
        self.last = jnp.minimum(behind, layout.chunk) - 1

    def run(self) -> None:
        carried = self.refs["d_state" if self.plan.reverse else "final"]

        @pl.when(self.is_first)
        def _():
            carried[...] = self.refs["state"][...]
            if self.plan.kind == "summary":
                self.refs["transition"][...] = self._identity()

        heads = self._heads()
        tokens = delta_rule_chunk.prepare(heads)
        states = [carried[h] for h in self.heads]
        if self.plan.kind == "forward":
            if self.plan.keep:
                self._store_states("before", states)
            outputs, states = delta_rule_chunk.outputs(heads, tokens, states)
            self._store("o", [self.plan.scale * x for x in outputs])
        elif self.plan.kind == "summary":
            states = delta_rule_chunk.advance(heads, tokens, states)
            transitions = [self.refs["transition"][h] for h in self.heads]
            without = [h._replace(v=None) for h in heads]
            self._store_states("transition", delta_rule_chunk.advance(without, tokens, transitions))
        elif self.plan.kind == "state_gradient":
            states = delta_rule_chunk.state_gradients(heads, tokens, states)
        else:
            before = [self.refs["before"][h] for h in self.heads]
            found = delta_rule_chunk.gradients(heads, tokens, before, states)
            self._store_gradients(found)
            states = [x.state for x in found]
        for h in self.heads:
            carried[h] = states[h]

    def _heads(self) -> list[delta_rule_chunk.Head]:
        chunks = [Chunk(decay, self._documents(), self.last) for decay in self._decays()]
        beta = self._columns("beta")
        names = [name for name in ("k", "q", "v", "d_o") if name in self.refs]
        loaded = {name: self._load(name) for name in names}
        if "d_o" in loaded:
            loaded["d_o"] = [self.plan.scale * x.astype(self.plan.wide) for x in loaded["d_o"]]
        return [
            delta_rule_chunk.Head(
                chunks[h], beta=beta[h], **{name: loaded[name][h].astype(self.plan.narrow) for name in names}
            )
            for h in self.heads
        ]

    def _decays(self) -> list[Any]:
        if self.plan.decay == "none":
            return [NoDecay(self.chunk)] * len(self.heads)
        if self.plan.decay == "scalar":
            return by_heads(finite(self.refs["log_decay"][...].T))
        return [ByChannel(finite(x.astype(self.plan.wide))) for x in self._load("log_decay")]

    def _documents(self) -> Documents | None:
        if "runs" not in self.refs:
            return None
        row = self.refs["runs"][...]
        column = jnp.broadcast_to(row, (8, self.chunk)).T[:, :1]
        last = row[:, -1:]
        ends = (x.astype(self.plan.wide) for x in (column == 0, column == last, last == 0))
        return Documents(column == row, *ends)

    def _load(self, name: str) -> list[jax.Array]:
        """By head ``[c, K or V]``, zero behind the last token."""
        ref = self.refs[name]
        width = ref.shape[-1] // len(self.heads)
        loaded = [ref[:, h * width : (h + 1) * width] for h in self.heads]
        if self.valid is None:
            return loaded
        inside = lax.broadcasted_iota(jnp.int32, loaded[0].shape, 0) < self.valid
        wide = [x.astype(self.plan.wide) for x in loaded]
        return [jnp.where(inside, x, jnp.zeros_like(x)).astype(ref.dtype) for x in wide]

    def _columns(self, name: str) -> list[jax.Array]:
        columns = self.refs[name][...].T
        return [columns[:, h : h + 1] for h in self.heads]

    def _store(self, name: str, values: list[jax.Array]) -> None:
        ref, width = self.refs[name], values[0].shape[1]
        for h, value in enumerate(values):
            ref[:, h * width : (h + 1) * width] = value.astype(ref.dtype)

    def _store_states(self, name: str, values: list[jax.Array]) -> None:
        for h, value in enumerate(values):
            self.refs[name][h] = value.astype(self.refs[name].dtype)

    def _store_gradients(self, found: list[delta_rule_chunk.Gradients]) -> None:
        self._store("d_q", [x.q for x in found])
        self._store("d_k", [x.k for x in found])
        self._store("d_v", [x.v for x in found])
        self.refs["d_beta"][...] = self._side_by_side([x.beta for x in found]).T
        if self.plan.decay == "channel":
            self._store("d_log_decay", [suffix_sums(x.sums) + x.total for x in found])
        elif self.plan.decay == "scalar":
            sums = self._side_by_side([jnp.sum(x.sums, axis=1, keepdims=True) for x in found])
            total = self._side_by_side([jnp.sum(x.total, axis=1, keepdims=True) for x in found])
            self.refs["d_log_decay"][...] = (suffix_sums(sums) + total).T

    def _side_by_side(self, columns: list[jax.Array]) -> jax.Array:
        """``[c or 1, n]`` of each head's ``[c or 1, 1]``."""
        shape = (columns[0].shape[0], len(columns))
        lane, found = lax.broadcasted_iota(jnp.int32, shape, 1), jnp.broadcast_to(columns[0], shape)
        for h, column in enumerate(columns[1:], start=1):
            found = jnp.where(lane == h, jnp.broadcast_to(column, shape), found)
        return found

    def _identity(self) -> jax.Array:
        shape = self.refs["transition"].shape
        row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
        return (row == lane).astype(self.plan.wide)
