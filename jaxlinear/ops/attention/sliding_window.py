"""Causal softmax attention to the last ``window`` tokens, multi-head, grouped or multi-query."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.errors import UserError
from jaxlinear.ops import calls, checks, segments
from jaxlinear.ops.attention.op import attend, axes, by_kernel, check_shapes, choose_for
from jaxlinear.ops.backends import Form
from jaxlinear.ops.spec import Spec

_QUERY_BLOCK = 128


@calls.recorded
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
      k: ``[B, P+T, G, K]`` and v: ``[B, P+T, G, V]``; G divides H, and head h reads group ``h // (H/G)``. The first P keys
        (P may be 0) belong to earlier tokens: query t is at key position P+t.
      window: the number of tokens seen, including the present one.
      scale: of the logits; ``K**-0.5`` by default.
      segment_ids: ``[B, P+T]`` int; the window never crosses a change of id.
      backend: ``"recurrent"`` (one query at a time, for checking), ``"chunked"`` (blocks of queries, each against the keys
        that it can see; the backward pass recomputes the weights), ``"pallas"`` (a kernel for TPU or GPU) or ``"auto"``:
        ``"pallas"`` on TPU and GPU where it runs, else ``"chunked"``.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v. Logits and weights are float32 internally.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_shapes("sliding_window_attention", q, k, v)
    if not isinstance(window, int | np.integer):
        raise UserError(f"sliding_window_attention: the window is {window!r}; it must be a whole number of tokens")
    if window < 1:
        raise UserError(f"sliding_window_attention: the window is {window}; it must be at least 1")
    if 0 in (*q.shape[:3], v.shape[3]):
        return jnp.zeros_like(v, shape=(*q.shape[:3], v.shape[3]))
    length, keys = q.shape[1], k.shape[1]
    segment_ids = checks.segment_ids("sliding_window_attention", segment_ids, q.shape[0], keys)
    scale = checks.scale("sliding_window_attention", q.shape[3], scale)
    prefix = keys - length
    window = min(int(window), keys)
    form = choose(q, k, v, backend=backend)
    if form.is_kernel:
        return by_kernel(q, k, v, window, scale, segment_ids)
    block = 1 if form.name == "recurrent" else min(_QUERY_BLOCK, length)
    blocks = math.ceil(length / block)

    # Pad so that every block of queries has one run of equally many keys: `window - 1` before its first query.
    left, right = window - 1 - prefix, blocks * block - length
    k, v = (_pad(x, left, right) for x in (k, v))
    first = jnp.zeros((1, keys), jnp.int32) if segment_ids is None else segments.first_positions(segment_ids)
    # The first key of the document, of the window, and after the padding: whichever is last.
    lowest = jnp.maximum(first[:, prefix:] + left, jnp.arange(length, dtype=jnp.int32)[None])
    lowest = jnp.maximum(lowest, max(left, 0))
    meetings = [(i, i * block) for i in range(blocks)]
    return attend(q, k, v, lowest, meetings, scale=scale, offset=window - 1, block=block, run=window - 1 + block)


def choose(q: Any, k: Any, v: Any, *, backend: str | Form = "auto", **_: Any) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    return choose_for("sliding_window_attention", q, k, v, None, backend)


SLIDING_WINDOW_ATTENTION = Spec(
    sliding_window_attention, choose, axes, results=("q",), axis="heads", outputs=("output",), over_time="attention"
)


def _pad(x: jax.Array, left: int, right: int) -> jax.Array:
    """Pads axis 1 with zeros; a negative ``left`` drops that many positions instead."""
    x = x[:, max(-left, 0) :]
    return jnp.pad(x, ((0, 0), (max(left, 0), right), *((0, 0),) * (x.ndim - 2)))
