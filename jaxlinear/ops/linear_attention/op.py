"""Linear attention: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t.

The recurrence of linear attention, RetNet, Lightning attention, Mamba-2, GLA, HGRN2 and their kin.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import backends, calls, checks, dtypes, matrix_states, protocol
from jaxlinear.ops.backends import Form
from jaxlinear.ops.linear_attention.family import Inputs, LinearAttention, LinearAttentionKernel
from jaxlinear.ops.spec import TIME, Arrays, Axes, Spec
from jaxlinear.pallas.linear_attention import blocks

_CPU_CHANNEL_CHUNK = 32  # a decay by channel costs more in larger chunks; elsewhere the states matter more


@calls.recorded
def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    time: protocol.TimeAxis = protocol.UNSHARDED,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T`` and reads ``o_t = scale * S_t^T q_t``.

    Args:
      q, k: ``[B, T, H, K]``, or ``[B, T, 1, K]`` if all heads share them: kernels take these as they are if the decay is
        not by channel; otherwise they are copied for each head.
      v: ``[B, T, H, V]``.
      log_decay: at most 0. None (1 forever), ``[H]`` (constant in time), ``[B, T, H]`` or ``[B, T, H, K]`` (by key
        channel). -inf forgets.
      initial_state: ``[B, H, K, V]``, the state before the first token, of that token's document; None means zeros.
      scale: of the outputs; ``K**-0.5`` by default.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id.
      chunk_size: tokens per chunk. None is 64 for ``"chunked"``, 32 for a decay by key channel on CPU, or the smallest
        power of two that holds a shorter T; for ``"pallas"`` the size in the kernel's table. Affects only speed,
        memory and rounding.
      backend: ``"recurrent"`` (a loop over time), ``"chunked"`` (matrix products inside chunks), ``"pallas"`` (the same
        as a kernel for TPU and GPU, interpreted elsewhere) or ``"auto"``.
      time: where the time axis lies; on one device by default.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v, and the state after the last token ``[B, H, K, V]`` in float32 (float64
      if q, k or v is).

    ``auto`` uses the loop for at most 8 tokens, unless it is given a chunk size, and chunks for more: on TPU and GPU the
    kernel or, where it does not run, plain chunks, which is logged once. Chunks multiply in the dtype that holds those of
    q, k and v; all sums, decays and states are float32 (float64) in every backend.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    matrix_states.check_shapes(
        "linear_attention", q, k, v, log_decay, initial_state, constant_decay=True, may_share=True
    )
    batch, length, _, width = q.shape
    sharded = time is not protocol.UNSHARDED
    form = choose(q, k, v, log_decay, chunk_size=chunk_size, backend=backend, sharded=sharded)
    q, k = _shared_or_not(q, k, v, log_decay, form)
    wide = dtypes.wide(q.dtype, k.dtype, v.dtype)
    scale = checks.scale("linear_attention", width, scale)
    log_decay = None if log_decay is None else jnp.asarray(log_decay)
    if initial_state is None:
        initial_state = matrix_states.no_state(q, k, v)
    initial_state = jnp.asarray(initial_state).astype(wide)
    segment_ids = checks.segment_ids("linear_attention", segment_ids, batch, length)
    starts = None if segment_ids is None else time.starts(segment_ids)
    if 0 in v.shape[:3]:
        return jnp.zeros_like(v), initial_state
    if form.name == "recurrent":
        return _recurrent(q, k, v, log_decay, initial_state, starts, scale)
    keys, values = width, v.shape[3]
    if form.is_kernel:
        more = padding(q, k, v, backends.target().platform)
        q, k, v, log_decay, initial_state = _padded(q, k, v, log_decay, initial_state, more)
    inputs, constants = Inputs(q, k, v, log_decay, starts, None), None
    if log_decay is not None and log_decay.ndim == 1:
        inputs, constants = inputs._replace(log_decay=None), log_decay.astype(wide)
    if form.is_kernel:
        family = LinearAttentionKernel(scale, chunk_size, backends.target())
        o, final = protocol.as_one_chunk(family, time, inputs, constants, initial_state)
    else:
        if constants is not None:
            inputs = inputs._replace(present=jnp.ones((batch, length), bool))
        o, final = time.run(LinearAttention(scale), form.chunk, inputs, constants, initial_state)
    return o.astype(v.dtype)[..., :values], final[..., :keys, :values]


def choose(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any = None,
    *,
    chunk_size: int | None = None,
    backend: str | Form = "auto",
    sharded: bool = False,
    **_: Any,
) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    by_channel = matrix_states.is_by_channel(log_decay)
    if by_channel and matrix_states.is_shared(q, v):
        q, k = (jax.ShapeDtypeStruct((*x.shape[:2], v.shape[2], x.shape[3]), x.dtype) for x in (q, k))
    refused = functools.partial(refusal, q, k, v, chunk_size)
    most = _CPU_CHANNEL_CHUNK if by_channel and backends.platform() == "cpu" else matrix_states.CHUNK
    return matrix_states.choose(
        "linear_attention",
        backend,
        (q.shape, v.shape),
        refused,
        length=q.shape[1],
        chunk_size=chunk_size,
        sharded=sharded,
        chunk=most,
    )


def _shared_or_not(q, k, v, log_decay, form: Form):
    """q and k in the form's shape. Those that all heads share, ``[B, T, 1, K]``, stay so for kernels without a decay by
    channel; otherwise they are copied for every head."""
    if not matrix_states.is_shared(q, v) or (form.is_kernel and not matrix_states.is_by_channel(log_decay)):
        return q, k
    return tuple(matrix_states.for_every_head(x, v.shape[2]) for x in (q, k))


def _axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    by_head = (*TIME, axis)
    constant = getattr(arrays.get("log_decay"), "ndim", 0) == 1
    return {
        **dict.fromkeys(("q", "k", "v"), by_head),
        "log_decay": (axis,) if constant else by_head,
        "initial_state": ("batch", axis),
        "segment_ids": TIME,
    }


def _complete(arrays: Arrays, form: Form) -> Arrays:
    q, k, v = (arrays[name] for name in ("q", "k", "v"))
    if form.is_kernel and "initial_state" not in arrays:
        arrays = arrays | {"initial_state": matrix_states.no_state(q, k, v)}
    q, k = _shared_or_not(q, k, v, arrays.get("log_decay"), form)
    return arrays | {"q": q, "k": k}


def flops(heads: int, keys: int, values: int, *, decays: bool = True) -> int:
    """FLOPs of one token, forward. For each head: the product that is added to the state and the read at the query (2 K V
    each), and the decay (K V). This is the recurrence's cost; the additional work of chunks is not counted."""
    return heads * keys * values * (5 if decays else 4)


def _padded(q, k, v, log_decay, state, more: tuple[int, int]):
    """With so many channels of zeros more in K and in V."""

    def last(x, count):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)]) if count else x

    if matrix_states.is_by_channel(log_decay):
        log_decay = last(log_decay, more[0])
    state = last(last(state, more[1]).swapaxes(-1, -2), more[0]).swapaxes(-1, -2)
    return last(q, more[0]), last(k, more[0]), last(v, more[1]), log_decay, state


def _recurrent(q, k, v, log_decay, initial_state, starts, scale):
    """A loop over time."""
    wide = initial_state.dtype
    decay = jnp.exp(matrix_states.by_channel(log_decay, q.shape, wide))
    if starts is not None:
        decay = jnp.where(starts[:, :, None, None], jnp.zeros((), wide), decay)

    def step(state, xs):
        qt, kt, vt, at = xs
        state = at[..., None] * state + kt[..., None] * vt[:, :, None]
        return state, scale * dtypes.product("bhkv,bhk->bhv", state, qt)

    xs = [jnp.moveaxis(x.astype(wide), 1, 0) for x in (q, k, v, decay)]
    final, o = lax.scan(step, initial_state, xs)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, chunk_size: int | None, platform: str) -> str | None:
    """``matrix_states.refusal``; it is the same for every decay."""
    chunks = blocks.CHUNKS.get(platform, blocks.CHUNKS_INTERPRETED)
    of_heads = functools.partial(_of_heads, may_pad=_may_pad(q, k, v))
    return matrix_states.refusal(q, k, v, chunk_size, platform, chunks=chunks, of_heads=of_heads)


def padding(q: jax.Array, k: jax.Array, v: jax.Array, platform: str) -> tuple[int, int]:
    """How many channels of zeros to add to K and to V for the kernel, up to a multiple of 16: on TPU where too many heads
    would have to be in one block otherwise; on GPU where rows would not be aligned. They change no result."""
    if not _may_pad(q, k, v):
        return 0, 0
    widths = q.shape[3], v.shape[3]
    of_block = widths if q.shape[2] == v.shape[2] else widths[1:]
    if platform == "tpu":
        needed = blocks.heads_of_block(v.shape[2], of_block, 0) is None
    else:
        needed = platform == "gpu" and any(width % 8 for width in widths)
    more = [-width % 16 for width in widths] if needed else [0, 0]
    return more[0], more[1]


def _may_pad(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Only if one kernel has all of V: several may divide it otherwise than without padding."""
    return matrix_states.value_pieces(v.shape[3], matrix_states.product_bytes(q, k, v)) == 1


def _of_heads(heads: int, widths: tuple[int, ...], size: int, *, may_pad: bool) -> str | None:
    if may_pad:
        widths = tuple(width + -width % 16 for width in widths)
    if blocks.heads_of_block(heads, widths, 0) is not None:
        return None
    named = f"K, V = {widths}" if len(widths) > 1 else f"V = {widths[0]}"
    return (
        f"the kernel takes at most {blocks.HEADS} heads at a time, and {heads} heads with {named} need more to fill "
        "registers of 128 lanes; multiples of 16 need fewer"
    )


LINEAR_ATTENTION = Spec(
    linear_attention,
    choose,
    _axes,
    results=("v", "initial_state"),
    axis="heads",
    over_time="recurrence",
    complete=_complete,
)
