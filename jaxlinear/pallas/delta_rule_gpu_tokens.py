"""The delta rule for GPU, through Triton: what follows from the tokens of a chunk alone, for all chunks at once.

A program has one chunk of one head. It goes through keys and values by tiles of channels, so that no array outgrows the
registers, and produces what ``delta_rule_gpu_states`` carries through time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas import products
from jaxlinear.pallas.channel_decays_gpu import ByChannel
from jaxlinear.pallas.delta_rule_gpu_layout import (
    Layout,
    crossing,
    dot,
    exp,
    over_tiles,
    power_of_two,
    scaled,
    span,
)
from jaxlinear.pallas.products import Terms, dot_terms, terms

Refs = dict[str, Any]


class Place:
    """A program's position: chunk n of head h of row b."""

    def __init__(self, layout: Layout, n, h, b):
        self.layout, self.n, self.h, self.b = layout, n, h, b
        self.time = span(n * layout.chunk, layout.chunk)

    def given(self, ref, first, tile: int) -> jax.Array:
        """A tile ``[c, tile]`` of ``[B, T, H, K]`` in the dtype of products, zero outside the array."""
        at = ref.at[self.b, self.time, self.h, span(first, tile)]
        mask = self._inside(ref, first, tile)
        return plgpu.load(at, mask=mask, other=None if mask is None else 0.0)

    def give(self, ref, first, value: jax.Array) -> None:
        tile = value.shape[1]
        at = ref.at[self.b, self.time, self.h, span(first, tile)]
        plgpu.store(at, value.astype(ref.dtype), mask=self._inside(ref, first, tile))

    def load(self, ref, first: int, tile: int) -> jax.Array:
        """A tile ``[c, tile]`` of ``[B, H, N c, K]``."""
        return plgpu.load(ref.at[self.b, self.h, self.time, span(first, tile)])

    def store(self, ref, first: int, value: jax.Array) -> None:
        plgpu.store(ref.at[self.b, self.h, self.time, span(first, value.shape[1])], value.astype(ref.dtype))

    def load_terms(self, ref, count: int) -> Terms:
        """Matrices ``[c, c]`` stored side by side."""
        size = self.layout.chunk
        return tuple(self.load(ref, n * size, size) for n in range(count))

    def load_sum(self, ref, count: int) -> jax.Array:
        """The sum of such matrices, in the wide dtype."""
        return functools.reduce(jnp.add, [x.astype(self.layout.plan.wide) for x in self.load_terms(ref, count)])

    def store_terms(self, ref, values: Terms) -> None:
        for n, value in enumerate(values):
            self.store(ref, n * self.layout.chunk, value)

    def numbers(self, ref) -> jax.Array:
        """``[c]`` of ``[B, H, N c]``."""
        return plgpu.load(ref.at[self.b, self.h, self.time])

    def _inside(self, ref, first, tile: int) -> jax.Array | None:
        """The mask for an array that ends within the last tiles."""
        layout, mask = self.layout, None
        _, length, _, width = ref.shape
        if length % layout.chunk:
            rows = self.n * layout.chunk + jnp.arange(layout.chunk, dtype=jnp.int32)
            mask = jnp.broadcast_to(rows[:, None] < length, (layout.chunk, tile))
        if width != power_of_two(width):
            columns = first + jnp.arange(tile, dtype=jnp.int32)
            inside = jnp.broadcast_to(columns[None] < width, (layout.chunk, tile))
            mask = inside if mask is None else mask & inside
        return mask


class Documents:
    """Which tokens of a chunk see each other, and which see the state before it or reach the one after it; None for all."""

    def __init__(self, place: Place, refs: Refs):
        self.packed, chunk = "runs" in refs, place.layout.chunk
        self.row, self.lane = (lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
        if self.packed:
            self.run = plgpu.load(refs["runs"].at[place.b, place.time])
            self.last = plgpu.load(refs["runs"].at[place.b, (place.n + 1) * chunk - 1])

    def seen(self, products: jax.Array, *, itself: bool) -> jax.Array:
        """Zero where a token does not see the other: it sees earlier ones of its document and, with ``itself``, itself."""
        condition = self.row >= self.lane if itself else self.row > self.lane
        if self.packed:
            condition = condition & (self.run[:, None] == self.run[None])
        return jnp.where(condition, products, jnp.zeros_like(products))

    def ends(self, like: jax.Array) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
        """1 or 0 ``[c, 1]``, for the state before and for the state after; ``[]``, whether no document ends in the
        chunk."""
        if not self.packed:
            return None, None, None
        conditions = (self.run == 0)[:, None], (self.run == self.last)[:, None], self.last == 0
        first, last, one = (x.astype(like.dtype) for x in conditions)
        return first, last, one


class ByHead:
    """A decay of the whole head, or none: ``matrix`` ``[c, c]`` for i >= j, and the decays since the start and until the
    end of the chunk ``[c, 1]``; None for 1. The matrix fills many registers: it is computed on first use, which must not be
    in a loop."""

    since_start = until_end = whole = _sums = None

    def __init__(self, place: Place, refs: Refs, documents: Documents):
        if place.layout.plan.decay != "scalar":
            return
        coarse, fine = (place.numbers(refs[name]) for name in ("coarse", "fine"))
        end = (place.n + 1) * place.layout.chunk - 1
        last = [plgpu.load(refs[name].at[place.b, place.h, end]) for name in ("coarse", "fine")]
        self._sums, self._lower = (coarse, fine), documents.row >= documents.lane
        self.since_start = exp(coarse + fine)[:, None]
        self.until_end = exp((last[0] - coarse) + (last[1] - fine))[:, None]
        self.whole = exp(last[0] + last[1])

    @functools.cached_property
    def matrix(self) -> jax.Array | None:
        if self._sums is None:
            return None
        coarse, fine = self._sums
        steps = (coarse[:, None] - coarse[None]) + (fine[:, None] - fine[None])
        return exp(jnp.where(self._lower, steps, jnp.full_like(steps, -jnp.inf)))


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
    """``(I + lower)^-1`` by doubling, as in ``pallas.inverse``, with all blocks in one matrix."""
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


def times(x: jax.Array | None, y: jax.Array | None) -> Any:
    return y if x is None else x if y is None else x * y
