"""The delta rule for GPU, through Triton: the gradients of a chunk's tokens, for all chunks at once, from the gradients of
what they write and of the states."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.delta_rule.gpu_states import scaled_cotangent
from jaxlinear.pallas.delta_rule.gpu_tokens import decay_of
from jaxlinear.pallas.parts.channel_decays_gpu import ByChannel
from jaxlinear.pallas.parts.gpu_chunk import ByHead, Documents, Place
from jaxlinear.pallas.parts.gpu_layout import Layout, dot, over_tiles, span, times
from jaxlinear.pallas.parts.products import dot_terms, terms


def values_kernel(layout: Layout, names: tuple[str, ...], *refs) -> None:
    """The gradients of v, of beta, and of the products P and L ``[c, c]``, by tiles of values; and ``written``, what the
    tokens write, for the other kernel. The gradient of v is also that of the errors V - K S."""
    named, plan = dict(zip(names, refs, strict=True)), layout.plan
    place = Place(layout, *(pl.program_id(axis) for axis in range(3)))
    documents = Documents(place, named)
    beta = place.numbers(named["beta"])[:, None]
    solve = place.load_terms(named["inverse"], plan.terms)
    by_channel = plan.decay == "channel"
    keys = place.load(named["keys"], 0, layout.keys) if by_channel else place.given(named["k"], 0, layout.keys)
    since_start = place.numbers(named["since_start"])[:, None] if "since_start" in named else None
    square = jnp.zeros((layout.chunk, layout.chunk), plan.wide)
    tile = layout.value_tile

    def step(first, carry):
        d_attention, d_lower, d_beta = carry
        state = plgpu.load(state_at(named["before"], place, first, tile, 0, layout.keys))
        read = times(since_start, dot(keys, state, (1, 1), layout))
        error = place.given(named["v"], first, tile).astype(plan.wide) - read
        written = dot_terms(solve, terms(beta * error, plan.narrow, plan.terms), (1, 0), plan.wide)
        written = terms(written, plan.narrow, plan.terms)
        place.store(named["written"], first, written[0])
        d_solved = dot_terms(solve, (place.load(named["d_written"], first, tile),), (0, 0), plan.wide)
        d_attention = d_attention + dot(scaled_cotangent(place, named["d_o"], first, tile), written[0], (1, 1), layout)
        d_lower = d_lower - dot_terms(terms(d_solved, plan.narrow, plan.terms), written, (1, 1), plan.wide)
        d_beta = d_beta + jnp.sum(d_solved * error, axis=1)
        place.give(named["d_v"], first, beta * d_solved)
        return d_attention, d_lower, d_beta

    carry = square, square, jnp.zeros((layout.chunk,), plan.wide)
    d_attention, d_lower, d_beta = over_tiles(layout.values, tile, step, carry)
    d_attention, d_lower = documents.seen(d_attention, itself=True), documents.seen(d_lower, itself=False)
    overlap = place.load_sum(named["overlap"], plan.terms)
    plgpu.store(named["d_beta"].at[place.b, place.h, place.time], d_beta + jnp.sum(d_lower * overlap, axis=1))
    place.store(named["d_attention"], 0, d_attention)
    place.store_terms(named["d_overlap"], terms(beta * d_lower, plan.narrow, plan.terms_of_decays))


def keys_kernel(layout: Layout, names: tuple[str, ...], *refs) -> None:
    """The gradients of a tile of q, k and log decays; for decays by head, the tile's part, with sums yet to be taken."""
    named, plan = dict(zip(names, refs, strict=True)), layout.plan
    tile, both, heads = pl.program_id(1), pl.program_id(2), jnp.int32(plan.heads)
    place = Place(layout, pl.program_id(0), jax.lax.rem(both, heads), jax.lax.div(both, heads))
    first = tile * layout.key_tile
    documents = Documents(place, named)
    of_head = ByHead(place, named, documents)

    def step(value, carry):
        d_queries, d_keys, d_ends, held = carry
        at = value, layout.value_tile
        state, d_after = (
            plgpu.load(state_at(named[name], place, *at, first, layout.key_tile)) for name in ("before", "d_after")
        )
        d_queries = d_queries + dot(scaled_cotangent(place, named["d_o"], *at), state, (1, 0), layout)
        d_keys = d_keys - dot(place.given(named["d_v"], *at), state, (1, 0), layout)
        d_ends = d_ends + dot(place.load(named["written"], *at), d_after, (1, 0), layout)
        held = held + jnp.sum(state.astype(plan.wide) * d_after.astype(plan.wide), axis=0)
        return d_queries, d_keys, d_ends, held

    none = jnp.zeros((layout.chunk, layout.key_tile), plan.wide)
    carry = none, none, none, jnp.zeros((layout.key_tile,), plan.wide)
    d_queries, d_keys, d_ends, held = over_tiles(layout.values, layout.value_tile, step, carry)
    decay = decay_of(place, named, of_head, first, layout.key_tile)
    d_attention, d_overlap = (
        place.load_sum(named[name], count) for name, count in (("d_attention", 1), ("d_overlap", plan.terms_of_decays))
    )
    q, k = (place.given(named[name], first, layout.key_tile) for name in ("q", "k"))
    d_q, d_k_row, d_k_column, itself = _pairs_gradient(layout, decay, documents, q, k, d_attention, d_overlap)
    first_document, last_document, one = documents.ends(none)
    since_start, until_end = times(decay.since_start, first_document), times(decay.until_end, last_document)
    d_queries, d_keys, d_ends = (
        x if f is None else f * x for x, f in ((d_queries, since_start), (d_keys, since_start), (d_ends, until_end))
    )
    wide_q, wide_k = q.astype(plan.wide), k.astype(plan.wide)
    place.give(named["d_q"], first, d_q + itself * wide_k + d_queries)
    place.give(named["d_k"], first, d_k_row + d_k_column + itself * wide_q + d_keys + d_ends)
    if plan.decay == "none":
        return
    # The last token's write does not decay. Summed with terms that do, it would drown them or be lost among them.
    token = place.n * layout.chunk + jnp.arange(layout.chunk, dtype=jnp.int32)
    is_last = (token == jnp.minimum((place.n + 1) * layout.chunk, plan.length) - 1)[:, None]
    kept = wide_k * jnp.where(is_last, jnp.zeros_like(d_ends), d_ends)
    sums = wide_q * (d_q + d_queries) + wide_k * (d_k_row + d_keys - d_k_column) - kept
    whole = times(decay.whole, one)
    total = jnp.sum(kept, axis=0) + (held if whole is None else whole * held)
    if plan.decay == "channel":
        place.give(named["d_log_decay"], first, decay.from_last(sums) + total[None])
    else:
        plgpu.store(named["d_sums"].at[tile, place.b, place.h, place.time], jnp.sum(sums, axis=1))
        plgpu.store(named["d_total"].at[tile, place.b, place.h, place.n, span(0, 1)], jnp.sum(total)[None])


def _pairs_gradient(layout: Layout, decay: Any, documents: Documents, q, k, d_attention, d_overlap):
    """The gradients through the products of a tile: of q, and of k as row and as column, without those of a token with
    itself; and the gradient of these products ``[c, 1]``."""
    same = documents.row == documents.lane
    itself = jnp.sum(jnp.where(same, d_attention, jnp.zeros_like(d_attention)), axis=1)[:, None]
    d_attention = jnp.where(same, jnp.zeros_like(d_attention), d_attention)  # both are zero above the diagonal
    if not isinstance(decay, ByChannel):
        if decay.matrix is not None:
            d_attention, d_overlap = decay.matrix * d_attention, decay.matrix * d_overlap
        plan = layout.plan
        each = (d_attention, q, 1), (d_overlap, k, plan.terms_of_decays)
        d_q, d_k_row = (dot_terms(terms(d, plan.narrow, n), (k,), (1, 0), plan.wide) for d, _, n in each)
        d_k_column = sum(dot_terms(terms(d, plan.narrow, n), (x,), (0, 0), plan.wide) for d, x, n in each)
        return d_q, d_k_row, d_k_column, itself
    (d_q, d_k_row), d_k_column = decay.products_gradient([q, k], k, [d_attention, d_overlap])
    return d_q, d_k_row, d_k_column, itself


def state_at(ref, place: Place, value, values: int, key, keys: int):
    """A part of the states ``[B, N, H, V, K]``."""
    return ref.at[place.b, place.n, place.h, span(value, values), span(key, keys)]
