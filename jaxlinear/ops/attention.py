"""Causal softmax attention, multi-head, grouped or multi-query: blocks of queries against runs of keys.

Neither pass holds more of the matrix of logits than one block (FlashAttention-2, Dao 2023, arXiv:2307.08691): the forward
pass keeps, for every query, the largest logit so far, the sum of the weights and of the weighted values relative to it;
the backward pass computes the weights again from the log of that sum.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, dtypes, segments

_MASKED = -1e30  # finite, so that a row's maximum minus itself is 0 and not NaN
_QUERY_BLOCK = 256
_KEY_BLOCK = 512


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    offset: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention in which a token sees all of its own document up to itself. Memory grows with T, not T^2.

    Args:
      q: ``[B, T, H, K]``.
      k: ``[B, P+T, G, K]`` and v: ``[B, P+T, G, V]``; G divides H, and head h reads group ``h // (H/G)``. The P keys
        in front (P may be 0) are those of earlier tokens: query t stands at key position P+t.
      scale: of the logits; ``K**-0.5`` by default.
      segment_ids: ``[B, P+T]`` int; no token sees across a change of id.
      offset: the key position of query 0, an int32 scalar, where it is not P: the keys then go on behind the queries'
        own, as on a device that has some of the queries and all keys.
      backend: ``"recurrent"`` (one query at a time, for checking), ``"chunked"`` (blocks of queries against blocks of
        keys; those after a block of queries are skipped) or ``"auto"``, which is ``"chunked"``.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v. Logits and weights are float32 inside.
    """
    backends.check("causal_attention", backend, ("recurrent", "chunked"))
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_shapes("causal_attention", q, k, v)
    length, keys = q.shape[1], k.shape[1]
    prefix = keys - length
    block, run = (1, keys) if backend == "recurrent" else (min(_QUERY_BLOCK, length), min(_KEY_BLOCK, keys))
    padded = math.ceil(keys / run) * run
    k, v = (jnp.pad(x, ((0, 0), (0, padded - keys), (0, 0), (0, 0))) for x in (k, v))
    lowest = jnp.zeros((1, keys), jnp.int32) if segment_ids is None else segments.first_positions(segment_ids)
    blocks = range(math.ceil(length / block))
    if offset is not None:
        lowest = lax.dynamic_slice_in_dim(lowest, offset, length, axis=1)
        meetings = [(i, start) for i in blocks for start in range(0, padded, run)]
        return attend(q, k, v, lowest, meetings, scale=scale, offset=offset, block=block, run=run)
    # Block i of queries meets the runs up to the one that holds the key of its last query.
    meetings = [(i, start) for i in blocks for start in range(0, min(prefix + (i + 1) * block, padded), run)]
    return attend(q, k, v, lowest[:, prefix:], meetings, scale=scale, offset=prefix, block=block, run=run)


def check_shapes(operation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ``UserError`` for shapes that do not fit each other."""
    heads, groups = q.shape[2], k.shape[2]
    if heads % groups:
        raise UserError(f"{operation}: {groups} key heads do not divide {heads} query heads")
    if k.shape[1] < q.shape[1] or v.shape[:3] != k.shape[:3]:
        raise UserError(f"{operation}: keys {k.shape} and values {v.shape} do not fit queries {q.shape}")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lowest: jax.Array,
    meetings: list[tuple[int, int]],
    *,
    scale: float | None,
    offset: int | jax.Array,
    block: int,
    run: int,
) -> jax.Array:
    """Attention in which query t sees the keys ``lowest[t] .. offset + t``, of those in the runs that its block meets.

    Args:
      q: ``[B, T, H, K]``, k: ``[B, S, G, K]``, v: ``[B, S, G, V]``, padded so that every run of keys is whole.
      lowest: ``[B or 1, T]`` int32, at most ``offset + t``.
      meetings: (i, start): block i of queries meets the keys ``start .. start + run - 1``. One of the meetings of a
        query's block has to be with the query's own key, ``offset + t``.
      scale: of the logits; ``K**-0.5`` by default.
      offset: the key position of query 0. If it is traced, meetings behind a block's last query are passed over.
      block, run: queries in a block, keys in a run.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v.
    """
    batch, length, heads, width = q.shape
    groups, right = k.shape[2], -length % block
    scale = float(width**-0.5 if scale is None else scale)
    # By blocks I, and one matrix a group: the R = H / G heads that share its keys stand above each other. B and G stay
    # two axes, so that both can be spread over a mesh.
    q = jnp.pad(q, ((0, 0), (0, right), (0, 0), (0, 0)))
    q = q.reshape(batch, -1, block, groups, heads // groups, width).transpose(1, 0, 3, 4, 2, 5)
    q = q.reshape(*q.shape[:3], -1, width)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    lowest = jnp.pad(lowest, ((0, 0), (0, right))).reshape(lowest.shape[0], -1, block).swapaxes(0, 1)
    blocks, starts = (jnp.asarray(np.array(x, np.int32)) for x in zip(*meetings, strict=True))
    skips = isinstance(offset, jax.Array)
    o = _attend(q, k, v, lowest, blocks, starts, jnp.asarray(offset, jnp.int32), scale, run, skips)
    o = o.reshape(-1, batch, groups, heads // groups, block, v.shape[-1]).transpose(1, 0, 4, 2, 3, 5)
    return o.reshape(batch, -1, heads, v.shape[-1])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _attend(q, k, v, lowest, blocks, starts, offset, scale, run, skips):
    """``q [I, B, G, R * t, K]``, ``k [B, G, S, K]``, ``v [B, G, S, V]``, ``lowest [I, B or 1, t]``, and of the meetings
    the block and the first key ``[M]`` -> ``[I, B, G, R * t, V]``."""
    return _attend_forward(q, k, v, lowest, blocks, starts, offset, scale, run, skips)[0]


def _attend_forward(q, k, v, lowest, blocks, starts, offset, scale, run, skips):
    wide = dtypes.wide(q.dtype, v.dtype)

    def meet(carry, meeting):
        peak, total, o = carry
        i, start = meeting
        logits, seen = _logits(q, k, lowest, i, start, scale, offset, run)
        logits = jnp.where(seen, logits, jnp.full((), _MASKED, logits.dtype))
        before = _at(peak, i)
        highest = jnp.maximum(before, jnp.max(logits, axis=-1, keepdims=True))
        # What was counted of a row before its first visible key is worth exp(_MASKED - highest) = 0 from then on.
        fade, weights = jnp.exp(before - highest), jnp.exp(logits - highest)
        total = _put(total, fade * _at(total, i) + jnp.sum(weights, axis=-1, keepdims=True), i)
        weighted = dtypes.product("bgrs,bgsv->bgrv", weights.astype(v.dtype), _run(v, start, run))
        return _put(peak, highest, i), total, _put(o, fade * _at(o, i) + weighted, i)

    one = jnp.zeros((*q.shape[:-1], 1), wide)
    o = jnp.zeros((*q.shape[:-1], v.shape[-1]), wide)
    carry = jnp.full_like(one, _MASKED), one, o
    peak, total, o = _meetings(meet, carry, blocks, starts, offset, lowest.shape[2], skips)
    o, log_totals = checkpoint_name(((o / total).astype(v.dtype), peak + jnp.log(total)), "attention")
    return o, (q, k, v, lowest, blocks, starts, offset, o, log_totals)


def _attend_backward(scale, run, skips, residuals, do):
    q, k, v, lowest, blocks, starts, offset, o, log_totals = residuals
    # sum_v o do: the softmax's normaliser seen from behind (section 3.1.2)
    deltas = jnp.sum(o.astype(log_totals.dtype) * do.astype(log_totals.dtype), axis=-1, keepdims=True)

    def meet(carry, meeting):
        dq, dk, dv = carry
        i, start = meeting
        qi, doi, ki = _at(q, i), _at(do, i), _run(k, start, run)
        logits, seen = _logits(q, k, lowest, i, start, scale, offset, run)
        weights = jnp.where(seen, jnp.exp(logits - _at(log_totals, i)), jnp.zeros((), logits.dtype))
        dweights = dtypes.product("bgrv,bgsv->bgrs", doi, _run(v, start, run))
        dlogits = (scale * weights * (dweights - _at(deltas, i))).astype(q.dtype)
        dqi = _at(dq, i) + dtypes.product("bgrs,bgsk->bgrk", dlogits, ki)
        # Channels before keys: so the small operand is the one that is turned for the product.
        dki = dtypes.product("bgrk,bgrs->bgks", qi, dlogits)
        dvi = dtypes.product("bgrv,bgrs->bgvs", doi, weights.astype(v.dtype))
        return _put(dq, dqi, i), _add(dk, dki, start), _add(dv, dvi, start)

    dq = jnp.zeros(q.shape, dtypes.wide(q.dtype))
    dk, dv = (jnp.zeros((*x.shape[:2], x.shape[3], x.shape[2]), dtypes.wide(x.dtype)) for x in (k, v))
    dq, dk, dv = _meetings(meet, (dq, dk, dv), blocks, starts, offset, lowest.shape[2], skips)
    dk, dv = dk.swapaxes(2, 3), dv.swapaxes(2, 3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _meetings(meet, carry, blocks, starts, offset, block, skips):
    """``meet(carry, (block, start))`` for each meeting, but, if ``skips``, for those behind the block's last query."""

    def step(carry, meeting):
        if not skips:
            return meet(carry, meeting), None
        i, start = meeting
        return lax.cond(start < offset + (i + 1) * block, meet, lambda carry, _: carry, carry, meeting), None

    return lax.scan(step, carry, (blocks, starts))[0]


def _logits(q, k, lowest, i, start, scale, offset, run):
    """Of block i with a run of keys: the logits ``[B, G, R * t, s]``, and which are of keys that are seen."""
    logits = scale * dtypes.product("bgrk,bgsk->bgrs", _at(q, i), _run(k, start, run))
    low, block = _at(lowest, i), lowest.shape[2]
    high = offset + i * block + jnp.arange(block, dtype=jnp.int32)[None]  # the query's own key
    key = start + jnp.arange(run, dtype=jnp.int32)[None, None]
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
    """Adds ``part`` to ``total`` from ``start`` on, along the last axis."""
    present = lax.dynamic_slice_in_dim(total, start, part.shape[-1], axis=3)
    return lax.dynamic_update_slice_in_dim(total, present + part, start, axis=3)
