"""Causal softmax attention to the last ``window`` tokens, multi-head, grouped or multi-query."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, dtypes, segments

_MASKED = -1e30  # finite, so that a row's maximum minus itself is 0 and not NaN
_QUERY_BLOCK = 128


def sliding_window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention in which token t sees tokens t-window+1 .. t of its own document.

    Args:
      q: ``[B, T, H, K]``.
      k: ``[B, P+T, G, K]`` and v: ``[B, P+T, G, V]``; G divides H, and head h reads group ``h // (H/G)``. The P keys
        in front (P may be 0) are those of earlier tokens: query t stands at key position P+t.
      window: how many tokens are seen, the present one included.
      scale: of the logits; ``K**-0.5`` by default.
      segment_ids: ``[B, P+T]`` int; the window never crosses a change of id.
      backend: ``"recurrent"`` (one query at a time, for checking), ``"chunked"`` (blocks of queries, each against
        the keys that it can see; the backward pass recomputes the weights) or ``"auto"``, which is ``"chunked"``.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v. Logits and weights are float32 inside.
    """
    backends.check("sliding_window_attention", backend, ("recurrent", "chunked"))
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    batch, length, heads, width = q.shape
    groups, prefix = k.shape[2], k.shape[1] - length
    if heads % groups:
        raise UserError(f"sliding_window_attention: {groups} key heads do not divide {heads} query heads")
    if prefix < 0 or v.shape[:3] != k.shape[:3]:
        raise UserError(f"sliding_window_attention: keys {k.shape} and values {v.shape} do not fit queries {q.shape}")
    if window < 1:
        raise UserError(f"sliding_window_attention: the window is {window}; it must be at least 1")

    scale = width**-0.5 if scale is None else scale
    window = min(window, prefix + length)
    block = 1 if backend == "recurrent" else min(_QUERY_BLOCK, length)
    blocks = math.ceil(length / block)

    # Pad so that every block of queries sees the same number of keys: `window - 1` before its first query.
    left, right = window - 1 - prefix, blocks * block - length
    k, v = (_pad(x, left, right) for x in (k, v))
    q = jnp.pad(q, ((0, 0), (0, right), (0, 0), (0, 0)))
    # The first key that each query may see, whatever the window: that of its document, and none of the padding.
    first = jnp.zeros((1, prefix + length), jnp.int32) if segment_ids is None else segments.first_positions(segment_ids)
    first = jnp.pad(jnp.maximum(first + left, max(left, 0))[:, prefix:], ((0, 0), (0, right)))

    # One matrix a group, N = B * G of them: the R = H / G heads that share its keys stand above each other.
    repeats = heads // groups
    q = (q * scale).reshape(batch, blocks * block, groups, repeats, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch * groups, repeats, blocks * block, width)
    k, v = (x.swapaxes(1, 2).reshape(batch * groups, x.shape[1], x.shape[3]) for x in (k, v))
    if segment_ids is not None:
        first = jnp.repeat(first, groups, axis=0)
    o = _attend(q, k, v, first, window, block)
    o = o.reshape(batch, groups, repeats, blocks * block, v.shape[-1]).transpose(0, 3, 1, 2, 4)
    return o.reshape(batch, blocks * block, heads, v.shape[-1])[:, :length]


def _pad(x: jax.Array, left: int, right: int) -> jax.Array:
    """Pads axis 1 with zeros; a negative ``left`` drops that many positions instead."""
    x = x[:, max(-left, 0) :]
    return jnp.pad(x, ((0, 0), (max(left, 0), right), *((0, 0),) * (x.ndim - 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, first, window, block):
    """``q [N, R, T, K]``, ``k [N, S, K]``, ``v [N, S, V]``, ``first [N or 1, T]`` -> ``[N, R, T, V]``."""
    return _attend_forward(q, k, v, first, window, block)[0]


def _attend_forward(q, k, v, first, window, block):
    def step(carry, i):
        qi, ki, vi, seen = _block(q, k, v, first, i, window, block)
        logits = jnp.einsum("nrk,nsk->nrs", qi, ki, preferred_element_type=dtypes.wide(q.dtype))
        logits = jnp.where(seen, logits, jnp.full((), _MASKED, logits.dtype))
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        o = jnp.einsum("nrs,nsv->nrv", weights.astype(v.dtype), vi, preferred_element_type=dtypes.wide(v.dtype)) / total
        return carry, (o.astype(v.dtype), peak + jnp.log(total))

    _, (o, log_totals) = lax.scan(step, None, jnp.arange(q.shape[2] // block, dtype=jnp.int32))
    o, log_totals = checkpoint_name((_join(o, q.shape[1]), log_totals), "attention")
    return o, (q, k, v, first, o, log_totals)


def _attend_backward(window, block, residuals, do):
    q, k, v, first, o, log_totals = residuals
    # sum_v o do: the softmax's normaliser seen from behind (FlashAttention-2, arXiv:2307.08691, section 3.1.2)
    deltas = jnp.sum(o.astype(dtypes.wide(o.dtype)) * do.astype(dtypes.wide(o.dtype)), axis=-1, keepdims=True)

    def step(carry, xs):
        dk, dv = carry
        i, log_total = xs
        qi, ki, vi, seen = _block(q, k, v, first, i, window, block)
        doi, delta = _rows(do, i, block), _rows(deltas, i, block)
        logits = jnp.einsum("nrk,nsk->nrs", qi, ki, preferred_element_type=dtypes.wide(q.dtype))
        weights = jnp.where(seen, jnp.exp(logits - log_total), jnp.zeros((), logits.dtype))
        dweights = jnp.einsum("nrv,nsv->nrs", doi, vi, preferred_element_type=dtypes.wide(v.dtype))
        dlogits = (weights * (dweights - delta)).astype(q.dtype)
        dqi = jnp.einsum("nrs,nsk->nrk", dlogits, ki)
        # Channels before keys: so the small operand is the one that is turned for the product.
        dki = jnp.einsum("nrk,nrs->nks", qi, dlogits, preferred_element_type=dtypes.wide(v.dtype))
        dvi = jnp.einsum("nrv,nrs->nvs", doi, weights.astype(v.dtype), preferred_element_type=dtypes.wide(v.dtype))
        return (_add(dk, dki, i * block), _add(dv, dvi, i * block)), dqi

    carry = tuple(jnp.zeros((x.shape[0], x.shape[2], x.shape[1]), dtypes.wide(x.dtype)) for x in (k, v))
    (dk, dv), dq = lax.scan(step, carry, (jnp.arange(log_totals.shape[0], dtype=jnp.int32), log_totals))
    return _join(dq, q.shape[1]), dk.swapaxes(1, 2).astype(k.dtype), dv.swapaxes(1, 2).astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _block(q, k, v, first, i, window, block):
    """Block i: its queries ``[N, R * t, K]``, the keys and values ``[N, s, ...]`` in reach, and which of those each
    query sees, ``[N or 1, R * t, s]`` bool."""
    span = window - 1 + block
    ki = lax.dynamic_slice_in_dim(k, i * block, span, axis=1)
    vi = lax.dynamic_slice_in_dim(v, i * block, span, axis=1)
    query = jnp.arange(block, dtype=jnp.int32)[None]
    lowest = jnp.maximum(lax.dynamic_slice_in_dim(first, i * block, block, axis=1) - i * block, query)
    highest = query + window - 1  # the query's own key
    lowest, highest = (jnp.tile(bound, (1, q.shape[1]))[:, :, None] for bound in (lowest, highest))
    key = jnp.arange(span, dtype=jnp.int32)[None, None]
    return _rows(q, i, block), ki, vi, (key >= lowest) & (key <= highest)


def _rows(x, i, block):
    """Block i of ``[N, R, T, ...]`` as ``[N, R * t, ...]``."""
    xi = lax.dynamic_slice_in_dim(x, i * block, block, axis=2)
    return xi.reshape(x.shape[0], x.shape[1] * block, x.shape[3])


def _join(blocks: jax.Array, repeats: int) -> jax.Array:
    """``[blocks, N, R * t, ...]`` -> ``[N, R, blocks * t, ...]``."""
    n, groups, rows, width = blocks.shape
    blocks = blocks.reshape(n, groups, repeats, rows // repeats, width)
    return jnp.moveaxis(blocks, 0, 2).reshape(groups, repeats, -1, width)


def _add(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Adds ``part`` to ``total`` from ``start`` on, along the last axis."""
    present = lax.dynamic_slice_in_dim(total, start, part.shape[-1], axis=2)
    return lax.dynamic_update_slice_in_dim(total, present + part, start, axis=2)
