"""The delta rule for GPU, through Triton: what follows from the tokens of a chunk alone, for all chunks at once.

A program has one chunk of one head. It goes through keys and values by tiles of channels, so that no array outgrows the
registers, and produces what ``delta_rule_gpu_states`` carries through time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts import products
from jaxlinear.pallas.parts.channel_decays_gpu import ByChannel
from jaxlinear.pallas.parts.gpu_chunk import ByHead, Documents, Place, Refs
from jaxlinear.pallas.parts.gpu_layout import Layout, crossing, dot, over_tiles, scaled, span, times
from jaxlinear.pallas.parts.products import Terms, dot_terms, terms


def pairs(layout: Layout, decay: Any, rows: list[jax.Array]) -> list[jax.Array]:
    """The products of ``rows`` with the first of them over a tile, decayed if by channel; arbitrary above the diagonal."""
    if isinstance(decay, ByChannel):
        return decay.products(rows, rows[0])
    return [dot(r, rows[0], (1, 1), layout) for r in rows]


def decay_of(place: Place, refs: Refs, of_head: ByHead, first, tile: int) -> Any:
    if place.layout.plan.decay != "channel":
        return of_head
    return ByChannel(place.given(refs["log_decay"], first, tile), place.layout)


def inverse(lower: jax.Array, documents: Documents, layout: Layout) -> jax.Array:
    """``(I + lower)^-1`` by doubling, as in ``pallas.parts.inverse``, with all blocks in one matrix."""
    narrow = layout.plan.narrow
    found = (documents.row == documents.lane).astype(lower.dtype)
    found = found - jnp.where(crossing(documents.row, documents.lane, 0), lower, jnp.zeros_like(lower))
    for n in range(1, lower.shape[0].bit_length() - 1):
        b = jnp.where(crossing(documents.row, documents.lane, n), lower, jnp.zeros_like(lower))
        cut = terms(found, narrow, layout.plan.terms)
        reached = jnp.zeros_like(lower)
        for pair in products.pairs(_parts(b, narrow), cut):
            reached = reached + dot(*pair, (1, 0), layout)
        for pair in products.pairs(cut, _parts(reached, narrow)):
            found = found - dot(*pair, (1, 0), layout)
    return found


def _parts(x: jax.Array, narrow) -> Terms:
    """x as a sum of arrays of the products' dtype, to 16 bits."""
    if narrow == x.dtype:
        return (x,)
    high = x.astype(narrow)
    return high, (x - high.astype(x.dtype)).astype(narrow)


def tokens_kernel(layout: Layout, names: tuple[str, ...], *refs) -> None:
    """P, L and (I + beta L)^-1 ``[c, c]``; with a decay by channel the decayed keys, queries and ends, otherwise the decays
    of these; W and U."""
    named, plan = dict(zip(names, refs, strict=True)), layout.plan
    place = Place(layout, *(pl.program_id(axis) for axis in range(3)))
    documents = Documents(place, named)
    of_head = ByHead(place, named, documents)
    beta = place.numbers(named["beta"])[:, None]
    with_q = "q" in named
    tile, square = layout.key_tile, jnp.zeros((layout.chunk, layout.chunk), plan.wide)

    def multiply(first, sums):
        rows = [place.given(named[name], first, tile) for name in ("k", "q")[: len(sums)]]
        decay = decay_of(place, named, of_head, first, tile)
        return tuple(x + y for x, y in zip(sums, pairs(layout, decay, rows), strict=True))

    sums = over_tiles(layout.keys, tile, multiply, (square,) * (1 + with_q))
    if of_head.matrix is not None:
        sums = tuple(x * of_head.matrix for x in sums)
    overlap = documents.seen(sums[0], itself=False)
    if with_q:
        place.store(named["attention"], 0, documents.seen(sums[1], itself=True))
    if "overlap" in named:
        place.store_terms(named["overlap"], terms(overlap, plan.narrow, plan.terms))
    solve = terms(inverse(beta * overlap, documents, layout), plan.narrow, plan.terms)
    if "inverse" in named:
        place.store_terms(named["inverse"], solve)
    first_document, last_document, one = documents.ends(beta)
    wider = max(tile, layout.gradient_tile)  # there are no products of pairs here, which would take registers

    def decay_and_solve(first, carry):
        decay = decay_of(place, named, of_head, first, wider)
        since_start = times(decay.since_start, first_document)
        k = place.given(named["k"], first, wider)
        keys = scaled(k, since_start)
        if plan.decay == "channel":
            until_end = times(decay.until_end, last_document)
            place.store(named["ends"], first, scaled(k, until_end))
            if "keys" in named:
                place.store(named["keys"], first, keys)
            if with_q:
                place.store(named["queries"], first, scaled(place.given(named["q"], first, wider), since_start))
            whole = times(decay.whole, one)
            plgpu.store(named["whole"].at[place.b, place.h, place.n, span(first, wider)], whole)
        wide_keys = keys.astype(plan.wide) if plan.terms == 1 else times(since_start, k.astype(plan.wide))
        read = terms(beta * wide_keys, plan.narrow, plan.terms)
        place.store(named["w"], first, dot_terms(solve, read, (1, 0), plan.wide))
        return carry

    over_tiles(layout.keys, wider, decay_and_solve)
    if plan.decay != "channel":
        whole = times(jnp.ones((1,), plan.wide), times(of_head.whole, one))
        plgpu.store(named["whole"].at[place.b, place.h, place.n, span(0, 1)], whole)
        decays = times(of_head.since_start, first_document), times(of_head.until_end, last_document)
        for name, decay in zip(("since_start", "until_end"), decays, strict=True):
            if name in named:
                plgpu.store(named[name].at[place.b, place.h, place.time], jnp.sum(decay, axis=1))
    if "u" in named:

        def solve_values(first, carry):
            v = place.given(named["v"], first, layout.value_tile).astype(plan.wide)
            u = dot_terms(solve, terms(beta * v, plan.narrow, plan.terms), (1, 0), plan.wide)
            place.store(named["u"], first, u)
            return carry

        over_tiles(layout.values, layout.value_tile, solve_values)
