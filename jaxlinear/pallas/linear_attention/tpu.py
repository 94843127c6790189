"""Chunked linear attention for TPU: blocks of time are streamed through VMEM, a few heads at once, the states resident.

The forward pass keeps only the states before each block of time for the backward pass, which recomputes those before the
block's chunks.
"""

import collections
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.linear_attention import blocks
from jaxlinear.pallas.linear_attention import chunk as linear_attention_chunk
from jaxlinear.pallas.linear_attention.chunk import Chunk, Documents, Tokens
from jaxlinear.pallas.linear_attention.plan import Arguments, Plan
from jaxlinear.pallas.parts import chunk_decays, factored_decays, head_sums, lanes, memory
from jaxlinear.pallas.parts.channel_decays import ByChannel
from jaxlinear.pallas.parts.lanes import SUBLANES, Lanes
from jaxlinear.pallas.parts.products import dot
from jaxlinear.pallas.parts.target import Target

# How many turns before its own a chunk's products are written: as many as give the shortest schedules.
_AHEAD, _AHEAD_BACKWARD = 2, 1


class Shape(NamedTuple):
    length: int  # T
    time: int  # tokens of a block
    chunk: int  # tokens of a chunk
    heads: int  # of a block
    rows: int  # of arrays with one row per head: a multiple of 8


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


class Block:
    """Reads and writes one block of time of ``heads`` of those in ``refs``: all, except in the gradient with a decay by
    channel."""

    def __init__(self, plan: Plan, shape: Shape, refs, heads: range):
        remaining = iter(refs)

        def take(wanted: bool = True) -> Any:
            return next(remaining) if wanted else None

        self.plan, self.shape, self.heads = plan, shape, heads
        in_time, backward = plan.kind in ("forward", "gradient"), plan.kind == "gradient"
        self.keys, self.values, self.queries = take(), take(), take(in_time)
        self.d_o, self.before = take(backward), take(backward)
        self.log_decay, self.runs = take(plan.decay != "none"), take(plan.packed)
        self.state = take()
        self.o, self.before_out = take(plan.kind == "forward"), take(plan.keep)
        self.kept = take(plan.kind == "summary" and plan.decay == "channel")
        self.d_q, self.d_k, self.d_v = take(backward), take(backward), take(backward)
        self.d_log_decay = take(backward and plan.decay != "none")
        self.carry = take()  # the state between blocks and, at the end, the output

        step, self.steps = pl.program_id(2), pl.cdiv(shape.length, shape.time)
        self.is_first = step == 0
        self.left = shape.length - (self.steps - 1 - step if plan.reverse else step) * shape.time
        self.ragged = shape.length % shape.time != 0
        self.left_heads = plan.heads - pl.program_id(1) * shape.heads
        self.wide = self.carry.dtype
        self.chunks = range(shape.time // shape.chunk)
        self.by_channel: type = ByChannel

    def run(self) -> None:
        pl.when(self.is_first)(self._begin)
        if self.plan.decay == "channel" and self.plan.kind in ("forward", "gradient"):
            log_decays = [x for n in self.chunks for x in self._log_decays(n).values()]
            factored_decays.each_way(log_decays, self.keys.dtype, self.wide, self._work)
        else:
            self._work()

    def _work(self, by_channel: type = ByChannel) -> None:
        """``by_channel``: the class that handles decays by key channel, if there are any."""
        self.by_channel = by_channel
        states = {h: self._state(self.carry, h) for h in self.heads}
        work = {"forward": self._forward, "gradient": self._gradient}.get(self.plan.kind, self._accumulate)
        for h, state in work(states).items():
            self._store_state(self.carry, h, state)

    def _begin(self) -> None:
        rows = slice(self.heads.start, self.heads.stop)
        self.carry[rows] = self.state[rows]
        if self.kept is not None:
            self.kept[...] = jnp.ones_like(self.kept)
        if self.d_log_decay is not None and self.plan.decay == "constant":
            self.d_log_decay[...] = jnp.zeros_like(self.d_log_decay)

    def _forward(self, states: dict[int, jax.Array]) -> dict[int, jax.Array]:
        if self.before_out is not None:
            for h, state in states.items():
                self._store_state(self.before_out, h, state)
        scale = jnp.asarray(self.plan.scale, self.wide)
        units = ((n, h, chunk) for n in self.chunks for h, chunk in self._chunk(n).items())
        for (n, h, chunk), (tokens, attended) in _ahead(units, self._ready, _AHEAD):
            o = linear_attention_chunk.outputs(chunk, tokens, attended, states[h])
            self._store(self.o, n, h, scale * o)
            states[h] = linear_attention_chunk.advance(chunk, chunk.to_end(tokens.k), tokens.v, states[h])
        return states

    def _ready(self, n: int, h: int, chunk: Chunk, products: jax.Array | None = None) -> tuple[Tokens, jax.Array]:
        """The tokens of a chunk of a head, and what needs no state: ``attended``."""
        tokens = self._tokens(n, h, products)
        return tokens, linear_attention_chunk.attended(chunk, tokens, self.wide)

    def _accumulate(self, states: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """The map of a run; or backward, the gradient of its first state."""
        for n in reversed(self.chunks) if self.plan.reverse else self.chunks:
            for h, chunk in self._chunk(n).items():
                keys, values = self._load(self.keys, n, h), self._load(self.values, n, h)
                if self.plan.reverse:
                    values = self._times_scale(values)
                keys = chunk.from_start(keys) if self.plan.reverse else chunk.to_end(keys)
                states[h] = linear_attention_chunk.advance(chunk, keys, values, states[h])
                if self.kept is not None:
                    place = self._lanes(self.keys, h)
                    kept = chunk_decays.times(chunk.whole, place.broadcast(self.kept[h], 1))
                    self.kept[h] = place.taken(kept, 1)
        return states

    def _gradient(self, d_states: dict[int, jax.Array]) -> dict[int, jax.Array]:
        chunks, states = [self._chunk(n) for n in self.chunks], [{h: self._state(self.before, h) for h in self.heads}]
        for n in self.chunks[:-1]:
            loaded = {h: (self._load(self.keys, n, h), self._load(self.values, n, h)) for h in self.heads}
            states.append(
                {
                    h: linear_attention_chunk.advance(chunks[n][h], chunks[n][h].to_end(k), v, states[n][h])
                    for h, (k, v) in loaded.items()
                }
            )
        units = (
            (n, h, chunks[n][h], products)
            for n in reversed(self.chunks)
            for products in [self._products(n)]
            for h in self.heads
        )
        found: list[linear_attention_chunk.Gradients] = []
        for (n, h, chunk, _), (tokens, attended, d_attended) in _ahead(units, self._ready_backward, _AHEAD_BACKWARD):
            d = linear_attention_chunk.gradients(chunk, tokens, attended, d_attended, states[n][h], d_states[h])
            found.append(d)
            d_states[h] = d.state
            self._store_gradients(n, h, d)
            if h == self.heads[-1]:
                self._store_over_heads(n, found)
                found = []
        return d_states

    def _ready_backward(
        self, n: int, h: int, chunk: Chunk, products: jax.Array | None
    ) -> tuple[Tokens, jax.Array, jax.Array]:
        """``_ready``, and the gradient of ``attended``."""
        tokens, attended = self._ready(n, h, chunk, products)
        return tokens, attended, linear_attention_chunk.d_attended(chunk, tokens, self.wide)

    def _store_gradients(self, n: int, h: int, d: linear_attention_chunk.Gradients) -> None:
        self._store(self.d_v, n, h, d.v)
        if not self.plan.shared:
            self._store(self.d_q, n, h, d.q)
            self._store(self.d_k, n, h, d.k)
        if self.plan.decay == "channel":
            assert d.decay is not None
            self._store(self.d_log_decay, n, h, chunk_decays.suffix_sums(d.decay.tokens) + d.decay.total)

    def _store_over_heads(self, n: int, found: list[linear_attention_chunk.Gradients]) -> None:
        if self.plan.shared:
            q, k = self._load(self.queries, n, 0), self._load(self.keys, n, 0)
            d_products = self._over_heads([d.products for d in found]).astype(k.dtype)
            d_q, d_k = (self._over_heads(of_heads) for of_heads in ([d.q for d in found], [d.k for d in found]))
            self._store(self.d_q, n, 0, d_q + dot(d_products, k, (1, 0), self.wide))
            self._store(self.d_k, n, 0, d_k + dot(d_products, q, (0, 0), self.wide))
        if self.plan.by_head:
            self._store_by_head(n, [d.decay for d in found if d.decay is not None])

    def _over_heads(self, of_heads: list[jax.Array]) -> jax.Array:
        """The sum over heads; entries after the last head are arbitrary."""
        if self.plan.heads % self.shape.heads:
            of_heads = [chunk_decays.masked(h < self.left_heads, x) for h, x in enumerate(of_heads)]
        return functools.reduce(operator.add, of_heads)

    def _store_by_head(self, n: int, found: list[linear_attention_chunk.DecayGradient]) -> None:
        """A row per head: the terms whose sum, from the chunk's last token back to a token, is the gradient of its log
        decay; for a constant log decay, these gradients."""
        size, rows = self.shape.chunk, self.shape.rows
        token, lane = (lax.broadcasted_iota(jnp.int32, (size, rows), axis) for axis in (0, 1))
        sums, row = jnp.zeros((size, rows), self.wide), lax.broadcasted_iota(jnp.int32, (rows, size), 0)
        earlier = jnp.zeros((rows, size), self.wide)
        for h, d in enumerate(found):
            of_head = d.tokens + jnp.where(token[:, :1] == size - 1, d.total, jnp.zeros_like(d.total))
            sums, earlier = jnp.where(lane == h, of_head, sums), jnp.where(row == h, d.earlier, earlier)
        if self.plan.decay == "constant":
            self.d_log_decay[...] += self._inside(chunk_decays.suffix_sums(sums - earlier.T), n).T
        else:
            self.d_log_decay[:, self._at(n)] = sums.T - earlier

    def _chunk(self, n: int) -> dict[int, Chunk]:
        """The n-th chunk of the block, for each head."""
        size, documents = self.shape.chunk, self._documents(n)
        last = jnp.clip(self.left - n * size, 0, size) - 1 if self.ragged else size - 1
        decays: list[Any]
        if self.plan.decay == "none":
            decays = [chunk_decays.NoDecay(size)] * len(self.heads)
        elif self.plan.decay == "channel":
            decays = [self.by_channel(x) for x in self._log_decays(n).values()]
        elif self.plan.decay == "constant":
            of_heads = [self.log_decay[:, h : h + 1] for h in self.heads]
            decays = [chunk_decays.constant(chunk_decays.finite(x), size, last) for x in of_heads]
        else:
            coarse, fine = (
                self.log_decay[first : first + self.shape.heads, self._at(n)] for first in (0, self.shape.rows)
            )
            decays = [chunk_decays.by_sums(coarse[h : h + 1], fine[h : h + 1]) for h in self.heads]
        return {h: Chunk(x, documents, last) for h, x in zip(self.heads, decays, strict=True)}

    def _log_decays(self, n: int) -> dict[int, jax.Array]:
        """The log decays of the key channels of each head, ``[c, K]``."""
        return {h: self._load(self.log_decay, n, h).astype(self.wide) for h in self.heads}

    def _documents(self, n: int) -> Documents | None:
        if self.runs is None:
            return None
        size = self.shape.chunk
        row = self.runs[:, self._at(n)]
        column, rows = jnp.broadcast_to(row, (size, size)).T, jnp.broadcast_to(row, (size, size))
        last = jnp.broadcast_to(row[:, size - 1 :], (size, size))
        ends = (jnp.where(x, 1.0, 0.0).astype(self.wide) for x in (column == 0, column == last, last[:1, :1] == 0))
        return Documents(column == rows, *ends)

    def _products(self, n: int) -> jax.Array | None:
        """Products of queries and keys that all heads share. Forward, where the compiler itself sees that they are shared,
        its schedule is shorter without this."""
        if not self.plan.shared:
            return None
        return dot(self._load(self.queries, n, 0), self._load(self.keys, n, 0), (1, 1), self.wide)

    def _tokens(self, n: int, h: int, products: jax.Array | None = None) -> Tokens:
        q, k, v = (self._load(ref, n, h) for ref in (self.queries, self.keys, self.values))
        d_o = None if self.d_o is None else self._times_scale(self._load(self.d_o, n, h))
        return Tokens(q, k, v, d_o, products)

    def _times_scale(self, x: jax.Array) -> jax.Array:
        return (x.astype(self.wide) * jnp.asarray(self.plan.scale, self.wide)).astype(x.dtype)

    def _load(self, ref, n: int, h: int) -> jax.Array:
        place = self._lanes(ref, h)
        x = place.only(ref[self._at(n), place.register])
        return self._inside(x.astype(self.wide), n).astype(x.dtype) if self.ragged else x

    def _store(self, ref, n: int, h: int, x: jax.Array) -> None:
        place = self._lanes(ref, h)
        x, stored = x.astype(ref.dtype), (self._at(n), place.register)
        ref[stored] = place.only(x, ref[stored] if place.first else None)

    def _state(self, ref, h: int) -> jax.Array:
        return lanes.broadcast(ref[h], self._lanes(self.values, h), self._lanes(self.keys, h))

    def _store_state(self, ref, h: int, state: jax.Array) -> None:
        ref[h] = lanes.taken(state, self._lanes(self.values, h), self._lanes(self.keys, h))

    def _inside(self, x: jax.Array, n: int) -> jax.Array:
        """Zero after the end of the sequence, where the contents are arbitrary."""
        if not self.ragged:
            return x
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(row < self.left - n * self.shape.chunk, x, jnp.zeros_like(x))

    def _at(self, n: int) -> slice:
        return slice(n * self.shape.chunk, (n + 1) * self.shape.chunk)

    def _lanes(self, ref, h: int) -> Lanes:
        if self.plan.shared and any(ref is x for x in (self.keys, self.queries, self.d_q, self.d_k)):
            return lanes.head_lanes(0, ref.shape[1], 1)
        return lanes.head_lanes(h, ref.shape[1] // self.shape.heads, self.shape.heads)


def _ahead(units: Iterable[tuple], make: Callable, count: int) -> Iterator[tuple]:
    """Each unit with ``make(*unit)``, made ``count`` units before it is needed. The compiler's schedule stays close to the
    order of the program: without this, each unit would wait for its own products with nothing else to do."""
    waiting: collections.deque[tuple] = collections.deque()
    for unit in units:
        waiting.append((unit, make(*unit)))
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
