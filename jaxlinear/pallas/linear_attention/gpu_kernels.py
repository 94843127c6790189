"""Linear attention for GPU, through Triton: the states in time, and what follows from them for the tokens of each chunk.

    S' = whole S + V^T (until K),   O = scale (A V + (since Q) S^T)
    dS = whole dS' + dO^T (since Q),   dV = A^T dO + (until K) dS'^T,   dA = dO V^T

States are ``[V, K]``. A program goes through keys and values by tiles of channels, so that no array outgrows the registers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts.channel_decays_gpu import ByChannel
from jaxlinear.pallas.parts.gpu_chunk import ByHead, Documents, Place, Refs
from jaxlinear.pallas.parts.gpu_layout import Layout, dot, exp, finite, over_tiles, scaled, span, times


class Constant:
    """As ``ByHead``, for a log decay that is constant in time; tokens after the last one decay nothing."""

    def __init__(self, place: Place, refs: Refs, documents: Documents):
        chunk, length = place.layout.chunk, place.layout.plan.length
        log_decay = finite(plgpu.load(refs["log_decay"].at[place.h]))
        last = jnp.minimum(length - place.n * chunk, chunk) - 1

        def at(token: jax.Array) -> jax.Array:
            return jnp.minimum(token, last).astype(log_decay.dtype)

        row, lane = at(documents.row), at(documents.lane)
        lower, steps = documents.row >= documents.lane, (row - lane) * log_decay
        self.matrix = exp(jnp.where(lower, steps, jnp.full_like(steps, -jnp.inf)))
        token = at(jnp.arange(chunk, dtype=jnp.int32))[:, None]
        self.since_start = exp((token + 1) * log_decay)
        self.until_end = exp((last.astype(log_decay.dtype) - token) * log_decay)
        self.whole = exp((last + 1).astype(log_decay.dtype) * log_decay)


class _Chunk:
    """The decays and documents of a chunk; decays of channels are by tiles."""

    def __init__(self, layout: Layout, refs: Refs, n, h, b):
        self.layout, self.refs, self.place = layout, refs, Place(layout, n, h, b)
        self.of_keys = Place(layout, n, jnp.int32(0), b) if layout.plan.shared else self.place
        self.documents = Documents(self.place, refs)
        constant = layout.plan.decay == "constant"
        self.of_head = (Constant if constant else ByHead)(self.place, refs, self.documents)
        self.first_document, self.last_document, self.one = self.documents.ends(jnp.zeros((), layout.plan.wide))

    def decay(self, first) -> Any:
        plan = self.layout.plan
        if plan.decay != "channel":
            return self.of_head
        return ByChannel(self.place.given(self.refs["log_decay"], first, self.layout.key_tile), self.layout)

    def since_start(self, decay: Any) -> jax.Array | None:
        return times(decay.since_start, self.first_document)

    def until_end(self, decay: Any) -> jax.Array | None:
        return times(decay.until_end, self.last_document)

    def whole(self, decay: Any) -> Any:
        return times(decay.whole, self.one)

    def keys(self, name: str, first) -> jax.Array:
        return self.of_keys.given(self.refs[name], first, self.layout.key_tile)

    def values(self, name: str, first) -> jax.Array:
        """The gradient of o is given without the scale."""
        plan, value = self.layout.plan, self.place.given(self.refs[name], first, self.layout.value_tile)
        if name != "d_o":
            return value
        return (jnp.asarray(plan.scale, plan.wide) * value.astype(plan.wide)).astype(value.dtype)

    def state(self, name: str, values, keys) -> jax.Array:
        place, layout = self.place, self.layout
        tile = span(values, layout.value_tile), span(keys, layout.key_tile)
        return plgpu.load(self.refs[name].at[(place.b, place.n, place.h, *tile)])


def states_kernel(layout: Layout, names: tuple[str, ...], *refs) -> None:
    """A tile of the states before each chunk, or backward of their gradients after each, and the result after the last."""
    named, plan = dict(zip(names, refs, strict=True)), layout.plan
    tiles = jnp.int32(layout.keys // layout.key_tile)
    of_values, of_keys = lax.div(pl.program_id(0), tiles), lax.rem(pl.program_id(0), tiles)
    values, keys = of_values * layout.value_tile, of_keys * layout.key_tile
    h, b = pl.program_id(1), pl.program_id(2)
    tile = span(values, layout.value_tile), span(keys, layout.key_tile)

    def step(i, state):
        n = layout.chunks - 1 - i if plan.reverse else i
        if "states" in named:
            plgpu.store(named["states"].at[(b, n, h, *tile)], state.astype(named["states"].dtype))
        chunk = _Chunk(layout, named, n, h, b)
        decay = chunk.decay(keys)
        factor = chunk.since_start(decay) if plan.reverse else chunk.until_end(decay)
        read, written = ("q", "d_o") if plan.reverse else ("k", "v")
        added = dot(chunk.values(written, values), scaled(chunk.keys(read, keys), factor), (0, 0), layout)
        whole = chunk.whole(decay)
        whole = whole[None] if plan.decay == "channel" else whole
        return added + times(whole, state)

    state = plgpu.load(named["state"].at[(b, h, *tile)])
    state = lax.fori_loop(jnp.int32(0), jnp.int32(layout.chunks), step, state)
    plgpu.store(named["final"].at[(b, h, *tile)], state)


def outputs_kernel(layout: Layout, names: tuple[str, ...], *refs) -> None:
    """Some channels of o; or, backward, of the gradient of v."""
    named, plan = dict(zip(names, refs, strict=True)), layout.plan
    part, h = pl.program_id(1), pl.program_id(2)
    b, n = (of(pl.program_id(0), jnp.int32(layout.chunks)) for of in (lax.div, lax.rem))
    chunk = _Chunk(layout, named, n, h, b)
    read, written, over = ("k", "d_o", 0) if plan.reverse else ("q", "v", 1)
    of_values = [part * layout.states_tile + first for first in range(0, layout.states_tile, layout.value_tile)]
    by_channel = plan.decay == "channel"

    def of_keys(first, sums):
        attention, *outer = sums
        q, k, decay = chunk.keys("q", first), chunk.keys("k", first), chunk.decay(first)
        attention = attention + _pairs(chunk, decay, q, k)
        factor = (chunk.until_end if plan.reverse else chunk.since_start)(decay)
        reading = {"q": q, "k": k}[read]
        reading = scaled(reading, factor) if by_channel else reading
        for m, values in enumerate(of_values):
            found = dot(reading, chunk.state("states", values, first), (1, 1), layout)
            outer[m] = outer[m] + (found if by_channel else times(factor, found))
        return attention, *outer

    none = [jnp.zeros((layout.chunk, layout.value_tile), plan.wide) for _ in of_values]
    none.insert(0, jnp.zeros((layout.chunk, layout.chunk), plan.wide))
    attention, *outer = over_tiles(layout.keys, layout.key_tile, of_keys, tuple(none))
    if chunk.of_head.matrix is not None:
        attention = chunk.of_head.matrix * attention
    attention = chunk.documents.seen(attention, itself=True).astype(plan.narrow)
    for m, values in enumerate(of_values):
        o = dot(attention, chunk.values(written, values), (over, 0), layout) + outer[m]
        chunk.place.give(named["out"], values, o if plan.reverse else jnp.asarray(plan.scale, o.dtype) * o)


def keys_kernel(layout: Layout, names: tuple[str, ...], *refs) -> None:
    """The gradients of a tile of q, k and, if there is a decay, their log decays.

    The gradients of q and k that heads share are summed over some heads here. Written per head and read again to be summed,
    they would take 1,024 bytes per token and head, beside the other 1,664 of the backward pass (K = 128, V = 64).
    """
    named, plan = dict(zip(names, refs, strict=True)), layout.plan
    n, tile, row = (pl.program_id(axis) for axis in range(3))
    parts = named["d_q"].shape[2]
    b, part = (of(row, jnp.int32(parts)) for of in (lax.div, lax.rem))

    def of_head(h):
        return _keys_of_head(_Chunk(layout, named, n, h, b), named, tile)

    if plan.shared:
        together = -(-plan.heads // parts)
        heads = part * together, jnp.minimum((part + 1) * together, plan.heads)
        none = (jnp.zeros((layout.chunk, layout.key_tile), plan.wide),) * 2
        found = lax.fori_loop(*heads, lambda h, sums: tuple(map(jnp.add, sums, of_head(h))), none)
    else:
        found = of_head(part)
    for name, d in zip(("d_q", "d_k"), found, strict=True):
        Place(layout, n, part, b).give(named[name], tile * layout.key_tile, d)


def _keys_of_head(chunk: _Chunk, named: Refs, tile) -> tuple[jax.Array, jax.Array]:
    """One head's contribution to the gradients of a tile of q and k; those of its log decays are stored."""
    layout, place = chunk.layout, chunk.place
    plan, first = layout.plan, tile * layout.key_tile

    def of_pairs(values, d_attention):
        return d_attention + dot(chunk.values("d_o", values), chunk.values("v", values), (1, 1), layout)

    def of_states(values, sums):
        d_q, d_k, held = sums
        state, d_after = chunk.state("before", values, first), chunk.state("states", values, first)
        d_q = d_q + dot(chunk.values("d_o", values), state, (1, 0), layout)
        d_k = d_k + dot(chunk.values("v", values), d_after, (1, 0), layout)
        return d_q, d_k, held + jnp.sum(state.astype(plan.wide) * d_after.astype(plan.wide), axis=0)

    d_attention = jnp.zeros((layout.chunk, layout.chunk), plan.wide)
    d_attention = over_tiles(layout.values, layout.value_tile, of_pairs, d_attention)
    d_attention, decay = chunk.documents.seen(d_attention, itself=True), chunk.decay(first)
    q, k = chunk.keys("q", first), chunk.keys("k", first)
    # These fill most registers, so they are taken apart from those of the states, though values are loaded twice.
    d_q, d_k, itself = _pairs_gradient(chunk, decay, q, k, d_attention)
    shapes = *((layout.chunk, layout.key_tile),) * 2, (layout.key_tile,)
    none = tuple(jnp.zeros(x, plan.wide) for x in shapes)
    d_q_outer, d_k_outer, held = over_tiles(layout.values, layout.value_tile, of_states, none)
    d_q_outer = times(chunk.since_start(decay), d_q_outer)
    d_k_outer = times(chunk.until_end(decay), d_k_outer)
    wide_q, wide_k = q.astype(plan.wide), k.astype(plan.wide)
    found = d_q + itself * wide_k + d_q_outer, d_k + itself * wide_q + d_k_outer
    if plan.decay == "none":
        return found
    # The last token's write does not decay. Summed with terms that do, it would drown them or be lost among them.
    token = jnp.arange(layout.chunk, dtype=jnp.int32)
    last = jnp.minimum(plan.length - place.n * layout.chunk, layout.chunk) - 1
    written = wide_k * jnp.where((token == last)[:, None], jnp.zeros_like(d_k_outer), d_k_outer)
    sums = wide_q * (d_q + d_q_outer) - wide_k * d_k - written
    total = jnp.sum(written, axis=0) + times(chunk.whole(decay), held)
    if plan.decay == "channel":
        d_log_decay = decay.from_last(sums)
        place.give(named["d_log_decay"], first, d_log_decay + total[None])
        return found
    of_tokens, of_all = jnp.sum(sums, axis=1), jnp.sum(total)
    if plan.decay == "constant":
        tokens = (jnp.minimum(token, last) + 1).astype(plan.wide)  # how many of those up to each decay
        of_all = (last + 1).astype(plan.wide) * of_all + jnp.sum(tokens * of_tokens)
    else:
        plgpu.store(named["d_sums"].at[tile, place.b, place.h, place.time], of_tokens)
    plgpu.store(named["d_total"].at[tile, place.b, place.h, place.n, span(0, 1)], jnp.broadcast_to(of_all, (1,)))
    return found


def _pairs(chunk: _Chunk, decay: Any, q: jax.Array, k: jax.Array) -> jax.Array:
    """The products of queries and keys over a tile, decayed if by channel; arbitrary above the diagonal."""
    if isinstance(decay, ByChannel):
        return decay.products([q], k)[0]
    return dot(q, k, (1, 1), chunk.layout)


def _pairs_gradient(chunk: _Chunk, decay: Any, q: jax.Array, k: jax.Array, d: jax.Array):
    """The gradients of a tile of q and k, without the products of a token with itself; and those of these ``[c, 1]``."""
    documents, layout, none = chunk.documents, chunk.layout, jnp.zeros_like(d)
    same = documents.row == documents.lane
    itself = jnp.sum(jnp.where(same, d, none), axis=1)[:, None]
    if not isinstance(decay, ByChannel):
        d = times(decay.matrix, jnp.where(same, none, d))
        return dot(d, k, (1, 0), layout), dot(d, q, (0, 0), layout), itself
    (d_q,), d_k = decay.products_gradient([q], k, [jnp.where(same, none, d)])
    return d_q, d_k, itself
