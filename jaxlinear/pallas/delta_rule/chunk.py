"""One chunk of the delta rule for several heads, as values in registers: what a kernel does between its loads and stores.

With S the state before the chunk, K and Q the keys and queries decayed from its start, and E the keys decayed to its end,
the tokens write X at their keys and read O:

    X = (I + beta L)^-1 beta (V - K S),   O = scale (P X + Q S),   S' = whole S + E^T X,

where P and L are the decayed products of queries and of keys with keys, of each token with earlier ones and, in P, itself.
States are transposed, ``[V, K]``: a decay of each key channel then scales them along their rows. Every step is written for
all heads before the next one, so that no head waits for its own last step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.pallas.linear_attention.chunk import Chunk, DecayGradient, channel_gradients, decay_gradient
from jaxlinear.pallas.parts import inverse
from jaxlinear.pallas.parts.chunk_decays import times
from jaxlinear.pallas.parts.products import Terms, dot, dot_terms, terms


class Head(NamedTuple):
    """The tokens of one head, in the dtype of products; what is not needed is None."""

    chunk: Chunk
    k: jax.Array  # [c, K]
    beta: jax.Array  # [c, 1], wide
    q: Any = None  # [c, K]
    v: Any = None  # [c, V]
    d_o: Any = None  # [c, V], times the scale
    terms: int = 1  # the plan's


class Tokens(NamedTuple):
    """What follows from the tokens of one head alone."""

    inverse: Terms  # [c, c], of I + beta L
    overlap: jax.Array  # L
    attention: Any  # P


class Gradients(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array  # [c, 1]
    state: jax.Array  # of the state before the chunk
    decay: DecayGradient | None


def prepare(heads: Sequence[Head]) -> list[Tokens]:
    wide, narrow = heads[0].beta.dtype, heads[0].k.dtype
    pairs = [h.chunk.decays.pairwise((h.k,) if h.q is None else (h.q, h.k), h.k, wide) for h in heads]
    overlaps = [_earlier(h, products[-1]) for h, products in zip(heads, pairs, strict=True)]
    count = heads[0].terms
    solved = inverse.inverses([h.beta * x for h, x in zip(heads, overlaps, strict=True)], narrow, count)
    attention = [None if h.q is None else h.chunk.seen(x[0]).astype(narrow) for h, x in zip(heads, pairs, strict=True)]
    return [Tokens(terms(x, narrow, count), y, z) for x, y, z in zip(solved, overlaps, attention, strict=True)]


def outputs(heads: Sequence[Head], tokens: Sequence[Tokens], states: Sequence[jax.Array]):
    """By head: ``[c, V]``, without the scale; and the state after the chunk."""
    reads = [_from_start(h, (h.q, h.k), state) for h, state in zip(heads, states, strict=True)]
    written = _written(heads, tokens, [x[1] for x in reads])
    inner = [dot(t.attention, x[0], (1, 0), s.dtype) for t, x, s in zip(tokens, written, states, strict=True)]
    return [x + read[0] for x, read in zip(inner, reads, strict=True)], _after(heads, written, states)


def advance(heads: Sequence[Head], tokens: Sequence[Tokens], states: Sequence[jax.Array]) -> list[jax.Array]:
    """By head, the state after the chunk. Without values, for tokens that write zero: M times the state."""
    reads = _reads(heads, states)
    return _after(heads, _written(heads, tokens, reads), states)


def state_gradients(heads: Sequence[Head], tokens: Sequence[Tokens], d_after: Sequence[jax.Array]) -> list[jax.Array]:
    """By head, the gradient of the state before the chunk, from those of the outputs and of the state after it."""
    _, d_errors = _errors_gradients(heads, tokens, d_after)
    return _before(heads, d_errors, d_after)


def gradients(
    heads: Sequence[Head], tokens: Sequence[Tokens], states: Sequence[jax.Array], d_after: Sequence[jax.Array]
) -> list[Gradients]:
    """By head, from the gradients of the outputs and of the state after the chunk. ``states`` are those before it."""
    wide = heads[0].beta.dtype
    reads = _reads(heads, states)
    written = _written(heads, tokens, reads)
    d_solved, d_errors = _errors_gradients(heads, tokens, d_after)
    d_attention = [h.chunk.seen(dot(h.d_o, x[0], (1, 1), wide)) for h, x in zip(heads, written, strict=True)]
    d_lower = [
        -_earlier(h, dot_terms(_terms(h, d), x, (1, 1), wide)) for h, d, x in zip(heads, d_solved, written, strict=True)
    ]
    d_pairs = [(d_p, h.beta * d_l) for h, d_p, d_l in zip(heads, d_attention, d_lower, strict=True)]
    inner: list[Any] = [
        None if h.chunk.decays.by_channel else h.chunk.decays.pairwise_gradient((h.q, h.k), h.k, d, wide)
        for h, d in zip(heads, d_pairs, strict=True)
    ]
    d_before = _before(heads, d_errors, d_after)
    found = []
    for n, h in enumerate(heads):
        d_read = dot(h.d_o, states[n], (1, 0), wide), -dot(d_errors[n].astype(h.k.dtype), states[n], (1, 0), wide)
        d_written, d_decay = dot(written[n][0], d_after[n], (1, 0), wide), None
        if inner[n] is None:
            (d_q, d_k_row), d_k, d_decay = channel_gradients(
                h.chunk, (h.q, h.k), h.k, d_pairs[n], (d_read, d_written), (states[n], d_after[n]), h.terms
            )
        else:
            (d_q, d_k_row), d_k = inner[n]
            d_q_read, d_k_read = (times(h.chunk.since_start, x) for x in d_read)
            d_k_written = times(h.chunk.until_end, d_written)
            if h.chunk.decays.whole is not None:
                sums = h.chunk.decays.steps_gradient((tokens[n].attention, tokens[n].overlap), d_pairs[n])
                wide_k = h.k.astype(wide)
                read = h.q.astype(wide) * d_q_read + wide_k * d_k_read
                held = jnp.sum(states[n].astype(wide) * d_after[n], axis=0, keepdims=True)
                d_decay = decay_gradient(h.chunk, sums, read, wide_k, d_k_written, held)
            d_q, d_k = d_q + d_q_read, d_k + d_k_read + d_k_written
        d_beta = d_solved[n] * (h.v.astype(wide) - reads[n])
        d_beta = jnp.sum(d_beta, axis=1, keepdims=True) + jnp.sum(d_lower[n] * tokens[n].overlap, axis=1, keepdims=True)
        found.append(Gradients(d_q, d_k_row + d_k, d_errors[n], d_beta, d_before[n], d_decay))
    return found


def _reads(heads, states) -> list[jax.Array]:
    """What the keys read from the state before the chunk."""
    return [_from_start(h, (h.k,), state)[0] for h, state in zip(heads, states, strict=True)]


def _written(heads, tokens, reads) -> list[Terms]:
    """X, what the tokens write, given what they read from the state before the chunk."""
    errors = [-read if h.v is None else h.v.astype(read.dtype) - read for h, read in zip(heads, reads, strict=True)]
    return [
        _terms(h, dot_terms(t.inverse, _terms(h, h.beta * error), (1, 0), error.dtype))
        for h, t, error in zip(heads, tokens, errors, strict=True)
    ]


def _after(heads, written, states) -> list[jax.Array]:
    return [
        times(h.chunk.whole, s) + dot_terms(x, (h.chunk.to_end(h.k),), (0, 0), s.dtype)
        for h, x, s in zip(heads, written, states, strict=True)
    ]


def _errors_gradients(heads, tokens, d_after):
    """The gradients of beta (V - K S), and of V - K S."""
    wide = heads[0].beta.dtype
    outer = [_to_end(h, d) for h, d in zip(heads, d_after, strict=True)]
    inner = [dot(t.attention, h.d_o, (0, 0), wide) for h, t in zip(heads, tokens, strict=True)]
    d_solved = [
        dot_terms(t.inverse, _terms(h, x + y), (0, 0), wide)
        for h, t, x, y in zip(heads, tokens, outer, inner, strict=True)
    ]
    return d_solved, [h.beta * d for h, d in zip(heads, d_solved, strict=True)]


def _before(heads, d_errors, d_after) -> list[jax.Array]:
    """The gradients of the states before the chunk."""
    found = []
    for h, d_error, d in zip(heads, d_errors, d_after, strict=True):
        reading = jnp.concatenate([h.d_o, *_terms(h, -d_error)])
        q, k = (h.chunk.from_start(x) for x in (h.q, h.k))
        read = jnp.concatenate([q, *[k] * h.terms])
        found.append(times(h.chunk.whole, d) + dot(reading, read, (0, 0), d.dtype))
    return found


def _terms(head: Head, x: jax.Array) -> Terms:
    return terms(x, head.k.dtype, head.terms)


def _from_start(head: Head, rows: Sequence[jax.Array], state: jax.Array) -> list[jax.Array]:
    """``(since_start x) state^T`` for each x of ``rows``, by one product."""
    chunk, wide = head.chunk, head.beta.dtype
    by_channel, length = chunk.decays.by_channel, rows[0].shape[0]
    product = dot(jnp.concatenate([chunk.from_start(x) if by_channel else x for x in rows]), state, (1, 1), wide)
    products = [product[n * length : (n + 1) * length] for n in range(len(rows))]
    return products if by_channel else [times(chunk.since_start, y) for y in products]


def _to_end(head: Head, d_state: jax.Array) -> jax.Array:
    """``(until_end k) d_state^T``"""
    chunk, wide = head.chunk, head.beta.dtype
    if chunk.decays.by_channel:
        return dot(chunk.to_end(head.k), d_state, (1, 1), wide)
    return times(chunk.until_end, dot(head.k, d_state, (1, 1), wide))


def _earlier(head: Head, products: jax.Array) -> jax.Array:
    """Those of a token with earlier ones of its document."""
    row, lane = (lax.broadcasted_iota(jnp.int32, products.shape, axis) for axis in (0, 1))
    return head.chunk.seen(jnp.where(row > lane, products, jnp.zeros_like(products)))
