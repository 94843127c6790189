"""A chunk of one head in GPU programs, through Triton: where it is, its documents, and the decays of the whole head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts.gpu_layout import Layout, exp, power_of_two, span
from jaxlinear.pallas.parts.products import Terms

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
