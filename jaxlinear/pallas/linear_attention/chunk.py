"""One chunk of one head of linear attention, as values in registers: what a kernel does between its loads and stores.

States are transposed, ``[V, K]``: a decay of each key channel then scales them along their rows. Products have the tokens'
dtype, sums that of the state. ``decays`` are those of ``chunk_decays``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.pallas.parts.chunk_decays import scaled, times
from jaxlinear.pallas.parts.products import dot


class Documents(NamedTuple):
    """Masks of a chunk that documents share. The state before the chunk belongs to the first document."""

    same: jax.Array  # [c, c] bool, whether two tokens belong to one document
    in_first: jax.Array  # [c, 1 or c], 1 or 0, the same in all columns
    in_last: jax.Array  # [c, 1 or c], 1 or 0
    one: jax.Array  # [1, 1], 1 if no document ends in the chunk, else 0


class Chunk(NamedTuple):
    decays: Any
    documents: Documents | None
    last: Any  # the index of the last token; positions after it are padding

    @property
    def since_start(self) -> jax.Array | None:
        """What scales a token's read of the state before the chunk; None for 1."""
        return times(None if self.documents is None else self.documents.in_first, self.decays.since_start)

    @property
    def until_end(self) -> jax.Array | None:
        """What scales a token's write to the state after the chunk; None for 1."""
        return times(None if self.documents is None else self.documents.in_last, self.decays.until_end)

    @property
    def whole(self) -> jax.Array | None:
        """What scales the state before the chunk in the state after it; None for 1."""
        return times(None if self.documents is None else self.documents.one, self.decays.whole)

    def from_start(self, x: jax.Array) -> jax.Array:
        """``since_start * x``, in the dtype of x."""
        if not self.decays.by_channel:
            return scaled(x, self.since_start)
        return self.decays.from_start(x, None if self.documents is None else self.documents.in_first)

    def to_end(self, x: jax.Array) -> jax.Array:
        """``until_end * x``, in the dtype of x."""
        if not self.decays.by_channel:
            return scaled(x, self.until_end)
        return self.decays.to_end(x, None if self.documents is None else self.documents.in_last)

    def seen(self, products: jax.Array) -> jax.Array:
        """Products of pairs of tokens ``[c, c]``, set to zero where the second does not see the first."""
        if self.documents is None:
            return products
        return jnp.where(self.documents.same, products, jnp.zeros_like(products))


class Tokens(NamedTuple):
    q: Any  # [c, K]
    k: Any  # [c, K]
    v: Any  # [c, V]
    d_o: Any = None  # [c, V], times the scale
    products: Any = None  # [c, c], q k^T, if all heads share them


class Gradients(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    state: jax.Array  # of the state before the chunk
    decay: "DecayGradient | None"
    products: Any = None  # of ``Tokens.products``, if all heads share these: then q and k are without their part


class DecayGradient(NamedTuple):
    """The gradient of the log decays is ``suffix_sums(tokens - earlier^T) + total``."""

    tokens: jax.Array  # [c, K], or [c, 1] for a decay per head
    earlier: Any  # [1, c] for a decay per head, else None
    total: jax.Array  # [1, K] or [1, 1]


def attended(chunk: Chunk, tokens: Tokens, wide) -> jax.Array:
    """How much each token attends to those up to it, ``[c, c]``: decayed products of queries and keys, in the dtype of
    products."""
    if tokens.products is not None:
        products = chunk.decays.decayed(tokens.products)
    else:
        (products,) = chunk.decays.pairwise((tokens.q,), tokens.k, wide)
    return chunk.seen(products).astype(tokens.v.dtype)


def outputs(chunk: Chunk, tokens: Tokens, attended: jax.Array, state: jax.Array) -> jax.Array:
    """``[c, V]``, without the scale."""
    q, wide = tokens.q, state.dtype
    inner = dot(attended, tokens.v, (1, 0), wide)
    if chunk.decays.by_channel:
        return inner + dot(chunk.from_start(q), state, (1, 1), wide)
    return inner + times(chunk.since_start, dot(q, state, (1, 1), wide))


def advance(chunk: Chunk, keys: jax.Array, values: jax.Array, state: jax.Array) -> jax.Array:
    """``whole * state + values^T keys``. With keys decayed to the chunk's end, this is the state after it; with queries
    decayed from its start, the gradient of that before it."""
    return times(chunk.whole, state) + dot(values, keys, (0, 0), state.dtype)


def d_attended(chunk: Chunk, tokens: Tokens, wide) -> jax.Array:
    """The gradient of ``attended``, wide."""
    return chunk.seen(dot(tokens.d_o, tokens.v, (1, 1), wide))


def gradients(
    chunk: Chunk, tokens: Tokens, attended: jax.Array, d_attended: jax.Array, state: jax.Array, d_after: jax.Array
) -> Gradients:
    """The gradients, from those of the outputs and of the state after the chunk. ``state`` is the one before the chunk."""
    q, k, v, d_o = tokens[:4]
    wide = state.dtype
    outer = [dot(d_o, state, (1, 0), wide)], dot(v, d_after, (1, 0), wide)
    d_products, d_decay = None, None
    if chunk.decays.by_channel:
        (d_q,), d_k, d_decay = channel_gradients(chunk, (q,), k, (d_attended,), outer, (state, d_after))
    else:
        (d_q_outer,), d_k_outer = outer
        d_q_outer, d_k_outer = times(chunk.since_start, d_q_outer), times(chunk.until_end, d_k_outer)
        if chunk.decays.whole is not None:
            of_steps = chunk.decays.steps_gradient((attended,), (d_attended,))
            held = jnp.sum(state * d_after, axis=0, keepdims=True)
            d_decay = decay_gradient(chunk, of_steps, q.astype(wide) * d_q_outer, k.astype(wide), d_k_outer, held)
        if tokens.products is None:
            (d_q,), d_k = chunk.decays.pairwise_gradient((q,), k, (d_attended,), wide)
            d_q, d_k = d_q + d_q_outer, d_k + d_k_outer
        else:
            d_products, d_q, d_k = chunk.decays.decayed(d_attended), d_q_outer, d_k_outer
    d_v = dot(attended, d_o, (0, 0), wide)
    d_v = d_v + dot(chunk.to_end(k), d_after, (1, 1), wide)
    d_before = advance(chunk, chunk.from_start(q), d_o, d_after)
    return Gradients(d_q, d_k, d_v, d_before, d_decay, d_products)


def channel_gradients(chunk: Chunk, rows, columns, d_products, outer, states, count=1):
    """``decays.gradients`` for decays by channel: those of ``rows``, of ``columns`` and of the log decays. ``states``: the
    one before the chunk, and the gradient of the one after it."""
    before, d_after = states
    in_first, in_last = (None, None) if chunk.documents is None else (chunk.documents.in_first, chunk.documents.in_last)
    seen = [times(in_first, x) for x in outer[0]], times(in_last, outer[1])
    d = chunk.decays.gradients(rows, columns, d_products, seen, chunk.last, d_after.dtype, count)
    held = jnp.sum(before.astype(d_after.dtype) * d_after, axis=0, keepdims=True)
    return d.rows, d.columns, DecayGradient(d.tokens, None, d.total + times(chunk.whole, held))


def decay_gradient(
    chunk: Chunk, pairs: Any, read: jax.Array, k: jax.Array, d_k: jax.Array, held: jax.Array
) -> DecayGradient:
    """For a decay per head, from the terms of each kind of decay: ``pairs``, of those between tokens, as from
    ``ByHead.steps_gradient``; ``read`` ``[c, K]``, of those since the start; k times ``d_k``, the gradient of what it
    writes, of those until the end; and ``held`` ``[1, K]``, of that of the whole chunk, without this factor."""
    # The last token's write does not decay. Summed with terms that do, it would drown them or be lost among them.
    row = lax.broadcasted_iota(jnp.int32, d_k.shape, 0)
    written = k * jnp.where(row == chunk.last, jnp.zeros_like(d_k), d_k)
    total = jnp.sum(written, axis=0, keepdims=True) + times(chunk.whole, held)
    together = pairs.shape == read.shape
    tokens = (pairs + read if together else read) - written
    of_tokens, *apart = (jnp.sum(x, axis=1, keepdims=True) for x in ((tokens,) if together else (tokens, pairs)))
    earlier = jnp.sum(pairs, axis=0, keepdims=True)
    return DecayGradient(sum(apart, of_tokens), earlier, jnp.sum(total, axis=1, keepdims=True))
