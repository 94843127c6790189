"""Causal softmax attention to the last ``window`` tokens, multi-head, grouped or multi-query."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, segments

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
    ids = jnp.zeros((1, prefix + length), jnp.int32) if segment_ids is None else segments.runs(segment_ids)
    left, right = window - 1 - prefix, blocks * block - length
    k, v = (_pad(x, left, right) for x in (k, v))
    ids = _pad(ids + 1, left, right)  # 0 is padding
    q = jnp.pad(q, ((0, 0), (0, right), (0, 0), (0, 0)))

    # [B, G, R, T, K]: the R = H / G heads that share a group's keys.
    q = (q * scale).reshape(batch, blocks * block, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    o = _attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), ids, window, block)
    return o.transpose(0, 3, 1, 2, 4).reshape(batch, blocks * block, heads, v.shape[-1])[:, :length]


def _pad(x: jax.Array, left: int, right: int) -> jax.Array:
    """Pads axis 1 with zeros; a negative ``left`` drops that many positions instead."""
    x = x[:, max(-left, 0) :]
    return jnp.pad(x, ((0, 0), (max(left, 0), right), *((0, 0),) * (x.ndim - 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, ids, window, block):
    return _attend_forward(q, k, v, ids, window, block)[0]


def _attend_forward(q, k, v, ids, window, block):
    def step(carry, i):
        qi, ki, vi, bias = _block(q, k, v, ids, i, window, block)
        logits = jnp.einsum("bgrtk,bgsk->bgrts", qi, ki, preferred_element_type=_float32(q)) + bias[:, None, None]
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        o = jnp.einsum("bgrts,bgsv->bgrtv", weights.astype(vi.dtype), vi, preferred_element_type=_float32(v)) / total
        return carry, (o.astype(v.dtype), peak + jnp.log(total))

    _, (o, log_totals) = lax.scan(step, None, jnp.arange(q.shape[3] // block))
    o = _join(o)
    return o, (q, k, v, ids, o, log_totals)


def _attend_backward(window, block, residuals, do):
    q, k, v, ids, o, log_totals = residuals
    # sum_v o do: the softmax's normaliser seen from behind (FlashAttention-2, arXiv:2307.08691, section 3.1.2)
    deltas = jnp.sum(o.astype(_float32(o)) * do.astype(_float32(o)), axis=-1, keepdims=True)
    span = window - 1 + block

    def step(carry, xs):
        dk, dv = carry
        i, log_total = xs
        qi, ki, vi, bias = _block(q, k, v, ids, i, window, block)
        doi = lax.dynamic_slice_in_dim(do, i * block, block, axis=3)
        delta = lax.dynamic_slice_in_dim(deltas, i * block, block, axis=3)
        logits = jnp.einsum("bgsk,bgrtk->bgsrt", ki, qi, preferred_element_type=_float32(q))
        logits = logits + bias.swapaxes(1, 2)[:, None, :, None]
        weights = jnp.exp(logits - jnp.moveaxis(log_total, -1, 2))
        dweights = jnp.einsum("bgsv,bgrtv->bgsrt", vi, doi, preferred_element_type=_float32(v))
        dlogits = (weights * (dweights - jnp.moveaxis(delta, -1, 2))).astype(q.dtype)
        dqi = jnp.einsum("bgsrt,bgsk->bgrtk", dlogits, ki)
        dki = jnp.einsum("bgsrt,bgrtk->bgsk", dlogits, qi, preferred_element_type=_float32(v))
        dvi = jnp.einsum("bgsrt,bgrtv->bgsv", weights.astype(v.dtype), doi, preferred_element_type=_float32(v))
        return (_add(dk, dki, i * block, span), _add(dv, dvi, i * block, span)), dqi

    carry = (jnp.zeros(k.shape, _float32(k)), jnp.zeros(v.shape, _float32(v)))
    (dk, dv), dq = lax.scan(step, carry, (jnp.arange(log_totals.shape[0]), log_totals))
    return _join(dq), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _block(q, k, v, ids, i, window, block):
    """Block i: its queries ``[B, G, R, t, K]``, the keys and values ``[B, G, s, ...]`` in reach, and what to add to
    its logits so that only those that are seen count, ``[B or 1, t, s]``."""
    span = window - 1 + block
    qi = lax.dynamic_slice_in_dim(q, i * block, block, axis=3)
    ki = lax.dynamic_slice_in_dim(k, i * block, span, axis=2)
    vi = lax.dynamic_slice_in_dim(v, i * block, span, axis=2)
    query = jnp.arange(block)[:, None]
    key = jnp.arange(span)[None, :]
    seen = (key >= query) & (key < query + window)  # key `query + window - 1` is the query's own
    key_ids = lax.dynamic_slice_in_dim(ids, i * block, span, axis=1)
    seen = seen[None] & (key_ids[:, window - 1 :, None] == key_ids[:, None, :])
    return qi, ki, vi, jnp.where(seen, 0.0, _MASKED).astype(_float32(q))


def _join(blocks: jax.Array) -> jax.Array:
    """``[N, B, G, R, t, ...]`` -> ``[B, G, R, N * t, ...]``."""
    n, batch, groups, repeats, size = blocks.shape[:5]
    return jnp.moveaxis(blocks, 0, 3).reshape(batch, groups, repeats, n * size, *blocks.shape[5:])


def _float32(x: jax.Array) -> jnp.dtype:
    """What sums over x are taken in: float32, or float64 when given that."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _add(total: jax.Array, part: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Adds ``part`` to ``total[:, :, start : start + size]``."""
    present = lax.dynamic_slice_in_dim(total, start, size, axis=2)
    return lax.dynamic_update_slice_in_dim(total, present + part.astype(total.dtype), start, axis=2)
