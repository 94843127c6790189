"""The delta rule for TPU: a chunk of time for several heads at once, as the arrays lie in memory, with the states in VMEM.

A block is ``[c, n K]`` of ``[T, H K]``. Arrays with one number per token and head, which are small, are rearranged by
chunks and blocks of heads, ``[B, N, c]`` for each head. State outputs are also where states are carried from chunk to
chunk.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.delta_rule import blocks
from jaxlinear.pallas.delta_rule import chunk as delta_rule_chunk
from jaxlinear.pallas.delta_rule.plan import Arguments, Plan, size_of
from jaxlinear.pallas.linear_attention.chunk import Chunk, Documents
from jaxlinear.pallas.parts import chunk_decays, factored_decays, head_sums, lanes, memory
from jaxlinear.pallas.parts.channel_decays import ByChannel
from jaxlinear.pallas.parts.lanes import Lanes
from jaxlinear.pallas.parts.target import Target


class Shape(NamedTuple):
    chunk: int  # tokens of a chunk
    heads: int  # of a block


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


class Block:
    """Reads and writes one chunk of some heads of a block, whose refs are ``refs``."""

    def __init__(self, plan: Plan, shape: Shape, refs: dict[str, Any], heads: range):
        self.plan, self.refs, self.chunk, self.of_block, self.heads = plan, refs, shape.chunk, shape.heads, heads
        self.rows = slice(heads.start, heads.stop)
        step, steps = pl.program_id(2), pl.cdiv(plan.length, shape.chunk)
        self.is_first = step == 0
        left = plan.length - (steps - 1 - step if plan.reverse else step) * shape.chunk
        self.left = None if plan.length % shape.chunk == 0 else left
        self.last = jnp.minimum(left, shape.chunk) - 1

    def run(self) -> None:
        carried = self.refs["d_state" if self.plan.reverse else "final"]

        @pl.when(self.is_first)
        def _():
            carried[self.rows] = self.refs["state"][self.rows]
            if self.plan.kind == "summary":
                self.refs["transition"][self.rows] = self._identity()

        if self.plan.decay == "channel":
            factored_decays.each_way(self._by_channel(), self.plan.narrow, self.plan.wide, self._work)
        else:
            self._work()

    def _work(self, by_channel: type = ByChannel) -> None:
        """``by_channel``: the class that handles decays by key channel, if there are any."""
        carried = self.refs["d_state" if self.plan.reverse else "final"]
        heads = self._heads(by_channel)
        tokens = delta_rule_chunk.prepare(heads)
        states = self._states(carried)
        if self.plan.kind == "forward":
            if self.plan.keep:
                self._store_states(self.refs["before"], states)
            outputs, states = delta_rule_chunk.outputs(heads, tokens, states)
            self._store("o", [self.plan.scale * x for x in outputs])
        elif self.plan.kind == "summary":
            states = delta_rule_chunk.advance(heads, tokens, states)
            transitions = self._states(self.refs["transition"])
            without = [h._replace(v=None) for h in heads]
            self._store_states(self.refs["transition"], delta_rule_chunk.advance(without, tokens, transitions))
        elif self.plan.kind == "state_gradient":
            states = delta_rule_chunk.state_gradients(heads, tokens, states)
        else:
            before = self._states(self.refs["before"])
            found = delta_rule_chunk.gradients(heads, tokens, before, states)
            self._store_gradients(found)
            states = [x.state for x in found]
        self._store_states(carried, states)

    def _heads(self, by_channel: type) -> list[delta_rule_chunk.Head]:
        chunks = [Chunk(decay, self._documents(), self.last) for decay in self._decays(by_channel)]
        beta = self._columns("beta")
        names = [name for name in ("k", "q", "v", "d_o") if name in self.refs]
        loaded = {name: self._load(name) for name in names}
        if "d_o" in loaded:
            loaded["d_o"] = [self.plan.scale * x.astype(self.plan.wide) for x in loaded["d_o"]]
        return [
            delta_rule_chunk.Head(
                chunk,
                beta=beta[n],
                terms=self.plan.terms,
                **{name: loaded[name][n].astype(self.plan.narrow) for name in names},
            )
            for n, chunk in enumerate(chunks)
        ]

    def _decays(self, by_channel: type) -> Sequence[Any]:
        if self.plan.decay == "none":
            return [chunk_decays.NoDecay(self.chunk)] * len(self.heads)
        if self.plan.decay == "channel":
            return [by_channel(x) for x in self._by_channel()]
        return chunk_decays.by_heads(*(self.refs["log_decay"][part, self.rows] for part in (0, 1)))

    def _by_channel(self) -> list[jax.Array]:
        """The log decays of the key channels of each head, ``[c, K]``."""
        return [x.astype(self.plan.wide) for x in self._load("log_decay")]

    def _documents(self) -> Documents | None:
        if "runs" not in self.refs:
            return None
        row = self.refs["runs"][...]
        column = jnp.broadcast_to(row, (8, self.chunk)).T[:, :1]
        last = row[:, -1:]
        ends = (x.astype(self.plan.wide) for x in (column == 0, column == last, last == 0))
        return Documents(column == row, *ends)

    def _load(self, name: str) -> list[jax.Array]:
        """By head ``[c, K or V]``, zero after the last token."""
        ref = self.refs[name]
        loaded = [place.only(ref[:, place.register]) for place in self._lanes(ref)]
        if self.left is None:
            return loaded
        inside = lax.broadcasted_iota(jnp.int32, loaded[0].shape, 0) < self.left
        wide = [x.astype(self.plan.wide) for x in loaded]
        return [jnp.where(inside, x, jnp.zeros_like(x)).astype(ref.dtype) for x in wide]

    def _columns(self, name: str) -> list[jax.Array]:
        columns = self.refs[name][...].T
        return [columns[:, h : h + 1] for h in self.heads]

    def _store(self, name: str, values: list[jax.Array]) -> None:
        ref = self.refs[name]
        for place, value in zip(self._lanes(ref), values, strict=True):
            others = ref[:, place.register] if place.first else None
            ref[:, place.register] = place.only(value.astype(ref.dtype), others)

    def _states(self, ref) -> list[jax.Array]:
        """By head ``[V, K]``, or ``[K, K]``."""
        return [lanes.broadcast(ref[h], *self._places(ref, h)) for h in self.heads]

    def _store_states(self, ref, values: list[jax.Array]) -> None:
        for h, value in zip(self.heads, values, strict=True):
            ref[h] = lanes.taken(value, *self._places(ref, h)).astype(ref.dtype)

    def _places(self, ref, h: int) -> list[Lanes]:
        return [lanes.head_lanes(h, channels, self.of_block) for channels in ref.shape[1:]]

    def _lanes(self, ref) -> list[Lanes]:
        return [lanes.head_lanes(h, ref.shape[-1] // self.of_block, self.of_block) for h in self.heads]

    def _store_gradients(self, found: list[delta_rule_chunk.Gradients]) -> None:
        self._store("d_q", [x.q for x in found])
        self._store("d_k", [x.k for x in found])
        self._store("d_v", [x.v for x in found])
        self.refs["d_beta"][self.rows] = self._side_by_side([x.beta for x in found]).T
        decays = [x.decay for x in found if x.decay is not None]
        if self.plan.decay == "channel":
            self._store("d_log_decay", [chunk_decays.suffix_sums(x.tokens) + x.total for x in decays])
        elif self.plan.decay == "scalar":
            # The terms whose sum, from the chunk's last token back to a token, is that token's gradient.
            tokens, total = (self._side_by_side(x) for x in ([x.tokens for x in decays], [x.total for x in decays]))
            is_last = lax.broadcasted_iota(jnp.int32, tokens.shape, 0) == self.chunk - 1
            earlier = jnp.concatenate([x.earlier for x in decays])
            self.refs["d_log_decay"][self.rows] = jnp.where(is_last, tokens + total, tokens).T - earlier

    def _side_by_side(self, columns: list[jax.Array]) -> jax.Array:
        """``[c or 1, n]`` from each head's ``[c or 1, 1]``."""
        shape = (columns[0].shape[0], len(columns))
        lane, found = lax.broadcasted_iota(jnp.int32, shape, 1), jnp.broadcast_to(columns[0], shape)
        for h, column in enumerate(columns[1:], start=1):
            found = jnp.where(lane == h, jnp.broadcast_to(column, shape), found)
        return found

    def _identity(self) -> jax.Array:
        shape = len(self.heads), *self.refs["transition"].shape[1:]
        row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))
        return (row == lane).astype(self.plan.wide)
