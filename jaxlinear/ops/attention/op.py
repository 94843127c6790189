"""Causal softmax attention: multi-head, grouped or multi-query. Its two passes are in ``ops.attention.blockwise``."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, segments
from jaxlinear.ops.attention import blockwise
from jaxlinear.ops.attention.blockwise import Meetings, Rule
from jaxlinear.ops.backends import Form
from jaxlinear.ops.spec import Axes, Spec
from jaxlinear.pallas.attention import blocks
from jaxlinear.pallas.attention import kernel as kernels

QUERY_BLOCK = 256
KEY_RUN = 512
_FEW = 128  # fewer queries do not fill a block of the kernel
_WIDEST = {"tpu": blocks.TPU_CHANNELS, "gpu": 256}  # channels per head


@calls.recorded
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
    """Softmax attention in which a token sees its document up to and including itself. Memory grows with T, not T^2.

    Args:
      q: ``[B, T, H, K]``.
      k: ``[B, P+T, G, K]`` and v: ``[B, P+T, G, V]``; G divides H, and head h reads group ``h // (H/G)``. The first P
        keys (P may be 0) belong to earlier tokens: query t is at key position P+t.
      scale: of the logits; ``K**-0.5`` by default.
      segment_ids: ``[B, P+T]`` int; no token sees across a change of id.
      offset: the key position of query 0, an int32 scalar, if it is not P: the keys then also extend beyond the
        queries' own, as on a device that holds some of the queries and all keys.
      backend: ``"recurrent"`` (one query at a time, for checking), ``"chunked"`` (blocks of queries against blocks of
        keys, skipping keys after the block of queries), ``"pallas"`` (a kernel for TPU or GPU) or ``"auto"``:
        ``"pallas"`` on TPU and GPU where it runs, else ``"chunked"``.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v. Logits and weights are float32 internally.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_shapes("causal_attention", q, k, v)
    if 0 in (*q.shape[:3], v.shape[3]):
        return jnp.zeros_like(v, shape=(*q.shape[:3], v.shape[3]))
    length, keys = q.shape[1], k.shape[1]
    segment_ids = checks.segment_ids("causal_attention", segment_ids, q.shape[0], keys)
    if isinstance(offset, int | np.integer) and not 0 <= offset <= keys - length:
        raise UserError(
            f"causal_attention: offset is {offset}; with {length} queries on {keys} keys it must be 0 to "
            f"{keys - length}"
        )
    scale = checks.scale("causal_attention", q.shape[3], scale)
    form = choose(q, k, v, offset=offset, backend=backend)
    if form.is_kernel:
        return by_kernel(q, k, v, keys, scale, segment_ids)
    prefix = keys - length
    block, run = (1, keys) if form.name == "recurrent" else (min(QUERY_BLOCK, length), min(KEY_RUN, keys))
    padded = math.ceil(keys / run) * run
    k, v = (jnp.pad(x, ((0, 0), (0, padded - keys), (0, 0), (0, 0))) for x in (k, v))
    lowest = jnp.zeros((1, keys), jnp.int32) if segment_ids is None else segments.first_positions(segment_ids)
    blocks = range(math.ceil(length / block))
    if offset is not None:
        lowest = lax.dynamic_slice_in_dim(lowest, offset, length, axis=1)
        meetings = [(i, start) for i in blocks for start in range(0, padded, run)]
        return attend(q, k, v, lowest, meetings, scale=scale, offset=offset, block=block, run=run)
    # Block i of queries meets the runs up to the one that holds its last query's own key.
    meetings = [(i, start) for i in blocks for start in range(0, min(prefix + (i + 1) * block, padded), run)]
    return attend(q, k, v, lowest[:, prefix:], meetings, scale=scale, offset=prefix, block=block, run=run)


def check_shapes(operation: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ``UserError`` for shapes that do not match."""
    checks.axes(operation, "B T H K", q=q)
    checks.axes(operation, "B T G K", k=k)
    checks.axes(operation, "B T G V", v=v)
    checks.numbers(operation, q=q, k=k, v=v)
    heads, groups = q.shape[2], k.shape[2]
    if heads % groups if groups else heads:
        raise UserError(f"{operation}: {groups} key heads do not divide {heads} query heads")
    if k.shape[1] < q.shape[1] or v.shape[:3] != k.shape[:3] or k.shape[::3] != q.shape[::3]:
        raise UserError(f"{operation}: keys {k.shape} and values {v.shape} do not fit queries {q.shape}")


def choose(q: Any, k: Any, v: Any, *, offset: Any = None, backend: str | Form = "auto", **_: Any) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    return choose_for("causal_attention", q, k, v, offset, backend)


def choose_for(operation: str, q: Any, k: Any, v: Any, offset: Any, backend: str | Form) -> Form:
    """The form of one of the operations of softmax attention."""

    def refusal(platform: str) -> str | None:
        if offset is not None:
            return "the kernel takes no offset: its queries are at the last positions of the keys"
        width = max(q.shape[3], v.shape[3])
        if width > _WIDEST.get(platform, width):
            return f"the kernel for {platform.upper()} takes up to {_WIDEST[platform]} channels per head, not {width}"
        for x in (q, k, v):
            if platform == "gpu" and x.dtype != jnp.bfloat16:
                return f"the kernel for GPU takes bfloat16, not {x.dtype}"
            if x.dtype not in (jnp.float32, jnp.bfloat16):
                return f"the kernel takes float32 and bfloat16, not {x.dtype}"
        if k.shape[2] != q.shape[2] and backends.target().platform != "gpu" and backends.indices_are_wide():
            return "JAX's kernel cannot share keys between heads under jax_enable_x64"
        return None

    few, forms = "chunked" if q.shape[1] < _FEW else None, ("recurrent", "chunked", "pallas")
    return backends.choose(operation, backend, forms, plain="chunked", few=few, refusal=refusal)


def axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    return {**dict.fromkeys(("q", "k", "v"), ("batch", None, axis)), "segment_ids": ("batch",)}


CAUSAL_ATTENTION = Spec(
    causal_attention, choose, axes, results=("q",), axis="heads", outputs=("output",), over_time="attention"
)


def by_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int, scale: float | None, segment_ids: jax.Array | None
) -> jax.Array:
    """Attention to the last ``window`` tokens, by the kernel of ``jaxlinear.pallas.attention.kernel``."""
    runs = None if segment_ids is None else segments.runs(segment_ids)
    return kernels.attention(q, k, v, runs, window=window, scale=scale_of(q, scale), target=backends.target())


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
    """Attention in which query t sees the keys ``lowest[t] .. offset + t`` that are in the runs its block meets.

    Args:
      q: ``[B, T, H, K]``, k: ``[B, S, G, K]``, v: ``[B, S, G, V]``, padded so that every run of keys is whole.
      lowest: ``[B or 1, T]`` int32, at most ``offset + t``.
      meetings: (i, start): block i of queries meets the keys ``start .. start + run - 1``. The block of query t must
        meet the run that holds the query's own key, ``offset + t``.
      scale: of the logits; ``K**-0.5`` by default.
      offset: the key position of query 0. If it is traced, meetings after a block's last query are skipped.
      block, run: queries per block, keys per run.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v.
    """
    length, heads, groups, dtype = q.shape[1], q.shape[2], k.shape[2], v.dtype
    q, k, v = promoted(q, k, v)
    rule = Rule(scale_of(q, scale), run, isinstance(offset, jax.Array))
    keys = k.shape[1]
    q, k, v = blockwise.by_blocks(q, groups, block), k.swapaxes(1, 2), v.swapaxes(1, 2)
    o = _attend(q, k, v, blockwise.meetings(meetings, lowest, offset, keys - 1, block), rule)
    return blockwise.from_blocks(o, length, heads, block).astype(dtype)


def promoted(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays in the dtype that holds all of theirs, in which they are multiplied, as in the kernels."""
    narrow = dtypes.narrow(*(x.dtype for x in arrays))
    return tuple(x.astype(narrow) for x in arrays)


def scale_of(q: jax.Array, scale: float | None) -> float:
    """The scale of the logits: ``scale``, or ``K**-0.5`` of q ``[..., K]``."""
    return float(q.shape[-1] ** -0.5 if scale is None else scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, meetings: Meetings, rule: Rule) -> jax.Array:
    """Takes arrays laid out as in ``ops.attention.blockwise``; returns ``[I, B, G, R * t, V]``."""
    return _attend_forward(q, k, v, meetings, rule)[0]


def _attend_forward(q, k, v, meetings, rule):
    sums = blockwise.see(blockwise.nothing_seen(q, v), q, k, v, meetings, rule)
    outputs = checkpoint_name(blockwise.normalised(sums, v), kernels.SAVED)
    return outputs[0], (q, k, v, meetings, outputs)


def _attend_backward(rule, residuals, do):
    q, k, v, meetings, outputs = residuals
    gradients = blockwise.no_gradient(q), *(blockwise.no_gradient(x, turned=True) for x in (k, v))
    dq, dk, dv = blockwise.pull_back(gradients, q, k, v, outputs, do, meetings, rule)
    dk, dv = dk.swapaxes(2, 3), dv.swapaxes(2, 3)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
