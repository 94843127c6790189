"""Causal softmax attention by blocks of queries against runs of keys: the building blocks of both passes.

Neither pass holds more than one block of the matrix of logits (FlashAttention-2, Dao 2023, arXiv:2307.08691). For every
query, the forward pass keeps the largest logit so far and, relative to it, the sum of the weights and of the weighted
values; the backward pass recomputes the weights from the log of that sum. Both passes continue from the accumulators
they are given, so keys may arrive piece by piece.

Queries are laid out in I blocks, with one matrix per group: ``q [I, B, G, R * t, K]``, in which the R = H / G heads
that share a group's keys are stacked. B and G stay separate axes, so that both can be sharded over a mesh. Keys and
values are ``k [B, G, S, K]`` and ``v [B, G, S, V]``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear.ops import dtypes

_MASKED = -1e30  # finite, so that a row's maximum minus itself is 0 and not NaN


class Meetings(NamedTuple):
    """Which blocks of queries meet which runs of keys, and which of those keys a query sees: from ``lowest`` to its own
    position ``offset + t``, or to ``last`` if that comes first."""

    blocks: jax.Array  # [M] int32, the block
    starts: jax.Array  # [M] int32, the first key of the run
    lowest: jax.Array  # [I, B or 1, t] int32; above ``last`` for a query that sees none
    offset: jax.Array  # int32, the key position of query 0
    last: jax.Array  # int32, the position of the last key before padding


class Sums(NamedTuple):
    """For every query, accumulated over the keys so far: ``[I, B, G, R * t, 1 or V]``, float32 at least."""

    peak: jax.Array  # the largest logit
    total: jax.Array  # the sum of the weights, relative to the peak
    weighted: jax.Array  # the sum of the weighted values


class Rule(NamedTuple):
    """What is fixed when the program is traced."""

    scale: float  # of the logits
    run: int  # keys in a run
    skips: bool  # whether meetings after a block's last query are skipped


def meetings(pairs: Sequence[tuple[int, int]], lowest: jax.Array, offset, last, block: int) -> Meetings:
    """From pairs (block, first key of the run) and ``lowest [B or 1, T]``."""
    blocks, starts = (jnp.asarray(np.array(x, np.int32)) for x in zip(*pairs, strict=True))
    lowest = jnp.pad(lowest, ((0, 0), (0, -lowest.shape[1] % block)))
    lowest = lowest.reshape(lowest.shape[0], -1, block).swapaxes(0, 1)
    return Meetings(blocks, starts, lowest, jnp.asarray(offset, jnp.int32), jnp.asarray(last, jnp.int32))


def by_blocks(x: jax.Array, groups: int, block: int) -> jax.Array:
    """``[B, T, H, K]`` -> ``[I, B, G, R * t, K]``, padded at the end."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, groups, heads // groups, width).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, width)


def from_blocks(x: jax.Array, length: int, heads: int, block: int) -> jax.Array:
    """The inverse of ``by_blocks``."""
    _, batch, groups, _, width = x.shape
    x = x.reshape(-1, batch, groups, heads // groups, block, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, heads, width)[:, :length]


def nothing_seen(q: jax.Array, v: jax.Array) -> Sums:
    """The initial sums."""
    one = jnp.zeros((*q.shape[:-1], 1), dtypes.wide(q.dtype, v.dtype))
    return Sums(jnp.full_like(one, _MASKED), one, jnp.zeros((*q.shape[:-1], v.shape[-1]), one.dtype))


def see(sums: Sums, q: jax.Array, k: jax.Array, v: jax.Array, meetings: Meetings, rule: Rule) -> Sums:
    """The sums with these keys and values included."""
    # The masks do not depend on the queries but are tied to them here. Otherwise, when layers are scanned, JAX hoists
    # the masks of all blocks, T^2 elements, out of the scan at once.
    _, meetings = lax.optimization_barrier((q[(0,) * q.ndim], meetings))

    def meet(sums, meeting):
        i, start = meeting
        logits, seen = _logits(q, k, meetings, i, start, rule)
        logits = jnp.where(seen, logits, jnp.full((), _MASKED, logits.dtype))
        before = _at(sums.peak, i)
        highest = jnp.maximum(before, jnp.max(logits, axis=-1, keepdims=True))
        # Whatever a row accumulated before its first visible key is then multiplied by exp(_MASKED - highest) = 0.
        fade, weights = jnp.exp(before - highest), jnp.exp(logits - highest)
        total = fade * _at(sums.total, i) + jnp.sum(weights, axis=-1, keepdims=True)
        weighted = dtypes.product("bgrs,bgsv->bgrv", weights.astype(v.dtype), _run(v, start, rule.run))
        weighted = fade * _at(sums.weighted, i) + weighted
        return Sums(*(_put(whole, part, i) for whole, part in zip(sums, (highest, total, weighted), strict=True)))

    return _each(meet, sums, meetings, rule)


def normalised(sums: Sums, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The outputs in the dtype of v, and the logs of the sums of weights. By now every query has seen a key."""
    return (sums.weighted / sums.total).astype(v.dtype), sums.peak + jnp.log(sums.total)


def pull_back(
    gradients: tuple[jax.Array, jax.Array, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    outputs: tuple[jax.Array, jax.Array],
    do: jax.Array,
    meetings: Meetings,
    rule: Rule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the gradients through these keys and values to ``dq``, ``dk [B, G, K, S]`` and ``dv [B, G, V, S]``.

    ``outputs`` are what ``normalised`` returned, and ``do`` is the gradient of its first output. Begin with
    ``no_gradient``.
    """
    o, log_totals = outputs
    # sum_v o do: the gradient through the softmax's normaliser (section 3.1.2)
    deltas = jnp.sum(o.astype(log_totals.dtype) * do.astype(log_totals.dtype), axis=-1, keepdims=True)

    def meet(gradients, meeting):
        dq, dk, dv = gradients
        i, start = meeting
        qi, doi, ki = _at(q, i), _at(do, i), _run(k, start, rule.run)
        logits, seen = _logits(q, k, meetings, i, start, rule)
        weights = jnp.where(seen, jnp.exp(logits - _at(log_totals, i)), jnp.zeros((), logits.dtype))
        dweights = dtypes.product("bgrv,bgsv->bgrs", doi, _run(v, start, rule.run))
        dlogits = (rule.scale * weights * (dweights - _at(deltas, i))).astype(q.dtype)
        dqi = _at(dq, i) + dtypes.product("bgrs,bgsk->bgrk", dlogits, ki)
        # Channels before keys, so that the smaller operand is the one transposed for the product.
        dki = dtypes.product("bgrk,bgrs->bgks", qi, dlogits)
        dvi = dtypes.product("bgrv,bgrs->bgvs", doi, weights.astype(v.dtype))
        return _put(dq, dqi, i), _add(dk, dki, start), _add(dv, dvi, start)

    return _each(meet, gradients, meetings, rule)


def no_gradient(x: jax.Array, *, turned: bool = False) -> jax.Array:
    """Initial zeros: for the gradient of q, or, if ``turned``, of k or v."""
    shape = (*x.shape[:-2], x.shape[-1], x.shape[-2]) if turned else x.shape
    return jnp.zeros(shape, dtypes.wide(x.dtype))


def _each(meet, carry, meetings: Meetings, rule: Rule):
    """``meet(carry, (block, start))`` for each meeting."""
    block = meetings.lowest.shape[2]

    def step(carry, meeting):
        if not rule.skips:
            return meet(carry, meeting), None
        i, start = meeting
        ahead = start < meetings.offset + (i + 1) * block
        return lax.cond(ahead, meet, lambda carry, _: carry, carry, meeting), None

    return lax.scan(step, carry, (meetings.blocks, meetings.starts))[0]


def _logits(q, k, meetings: Meetings, i, start, rule: Rule):
    """For block i and a run of keys: the logits ``[B, G, R * t, s]``, and a mask of the keys that are seen."""
    logits = rule.scale * dtypes.product("bgrk,bgsk->bgrs", _at(q, i), _run(k, start, rule.run))
    low, block = _at(meetings.lowest, i), meetings.lowest.shape[2]
    high = meetings.offset + i * block + jnp.arange(block, dtype=jnp.int32)[None]  # the query's own key
    high = jnp.minimum(high, meetings.last)
    key = start + jnp.arange(rule.run, dtype=jnp.int32)[None, None]
    seen = (key >= low[..., None]) & (key <= high[..., None])
    return logits, jnp.tile(seen, (1, q.shape[3] // block, 1))[:, None]


def _at(x, i):
    """Block i."""
    return lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False)


def _put(x, block, i):
    return lax.dynamic_update_index_in_dim(x, block, i, axis=0)


def _run(x, start, run):
    return lax.dynamic_slice_in_dim(x, start, run, axis=2)


def _add(total, part, start):
    """Adds ``part`` to ``total`` along the last axis, beginning at ``start``."""
    present = lax.dynamic_slice_in_dim(total, start, part.shape[-1], axis=3)
    return lax.dynamic_update_slice_in_dim(total, present + part, start, axis=3)
