"""The delta rule: S' = diag(exp(log_decay_t)) S_{t-1},  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = scale S_t^T q_t.

The recurrence of DeltaNet, Gated DeltaNet and Kimi Delta Attention: it replaces what the state holds at a key, whereas
linear attention adds to it. In DeltaProduct (Siems et al. 2025, arXiv:2502.10297) a token does so several times.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, matrix_states, protocol
from jaxlinear.ops.backends import Form
from jaxlinear.ops.delta_rule.family import DeltaRule, DeltaRuleKernel, Inputs
from jaxlinear.ops.spec import TIME, Arrays, Axes, Spec
from jaxlinear.pallas.delta_rule import blocks
from jaxlinear.pallas.parts import memory

_LEAST, _MOST = 16, 128  # tokens of a chunk of the kernel
_CHANNEL_CHUNK = 32  # the cost of a decay by channel within a chunk grows with the chunk's size


@calls.recorded
def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    negative_eigenvalues: bool = False,
    time: protocol.TimeAxis = protocol.UNSHARDED,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`` with ``S' = diag(exp(log_decay_t)) S_{t-1}``.

    A token may make J updates, each applied to the result of the one before; the state decays before the first and is
    read after the last.

    Args:
      q: ``[B, T, H, K]``.
      k: the same, or ``[B, T, H, J, K]``; used as given: the caller normalises it.
      v: ``[B, T, H, V]`` or ``[B, T, H, J, V]``.
      beta: ``[B, T, H]`` or ``[B, T, H, J]``, how much of what the state holds at k is replaced by v: from 0 to 1 for a
        k of unit length, or to 2 with ``negative_eigenvalues``. Where beta |k|^2 exceeds 2, as it may for a unit vector
        rounded to bfloat16, the state can grow without bound.
      log_decay: at most 0. None (1 forever), ``[B, T, H]`` or ``[B, T, H, K]`` (by key channel). -inf forgets.
      initial_state: ``[B, H, K, V]``, the state before the first token, of that token's document; None means zeros.
      scale: of the outputs ``o_t = scale * S_t^T q_t``; ``K**-0.5`` by default.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id.
      chunk_size: updates per chunk, rounded down to whole tokens, but to one token at least. None is 64 for
        ``"chunked"``, 32 for a decay by key channel, or the smallest power of two that holds fewer updates; for
        ``"pallas"`` the size in the kernel's table. Affects only speed, memory and rounding.
      backend: ``"recurrent"`` (a loop over time), ``"chunked"`` (matrix products inside chunks), ``"pallas"`` (the same
        as a kernel for TPU and GPU, interpreted on CPU) or ``"auto"``.
      negative_eigenvalues: whether beta |k|^2 exceeds 1, where a transition reverses what the state holds at k. The
        bfloat16 kernels then keep twice the digits in some products; otherwise their error is unbounded where keys are
        alike. Changes nothing else.
      time: where the time axis lies; on one device by default.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v, and the state after the last token ``[B, H, K, V]`` in float32 (float64
      if q, k or v is).

    ``auto`` uses the loop for at most 8 updates, unless it is given a chunk size, and chunks for more: on TPU and GPU
    the kernel or, where it does not run, plain chunks, which is logged once. Sums, decays and states are float32
    (float64) in every backend, and products of chunks are in the dtype that holds those of q, k and v. The exception is
    the solution for what the tokens of a chunk replace of each other: it is float32 in ``"chunked"``; in the kernel, if
    the products are in bfloat16, it is 8 bits wide, or 16 with ``negative_eigenvalues``.
    """
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    updates = _check_updates(k, v, beta)
    one = _one_update(k), _one_update(v)
    matrix_states.check_shapes("delta_rule", q, *one, log_decay, initial_state, constant_decay=False, may_share=False)
    batch, length, _, width = q.shape
    if beta.shape != (*q.shape[:3], *k.shape[3:-1]):
        raise UserError(f"delta_rule: beta {beta.shape} does not fit queries {q.shape}; it must be [B, T, H]")
    checks.real("delta_rule", beta=beta)
    form = choose(
        q,
        k,
        v,
        log_decay=log_decay,
        chunk_size=chunk_size,
        backend=backend,
        negative_eigenvalues=negative_eigenvalues,
        sharded=time is not protocol.UNSHARDED,
    )
    wide = dtypes.wide(q.dtype, k.dtype, v.dtype)
    scale = checks.scale("delta_rule", width, scale)
    log_decay = None if log_decay is None else jnp.asarray(log_decay)
    if initial_state is None:
        initial_state = matrix_states.no_state(q, k, v)
    initial_state = jnp.asarray(initial_state).astype(wide)
    segment_ids = checks.segment_ids("delta_rule", segment_ids, batch, length)
    starts = None if segment_ids is None else time.starts(segment_ids)
    if 0 in q.shape[:3]:
        return jnp.zeros_like(v, shape=(*q.shape[:3], v.shape[-1])), initial_state
    inputs = Inputs(q, k, v, beta, log_decay, starts)
    if form.is_kernel:
        # A token of the kernels makes one update and reads the state after it; of a token's J reads the last is used.
        family = DeltaRuleKernel(scale, chunk_size, backends.target(), negative_eigenvalues)
        o, final = protocol.as_one_chunk(family, time, inputs.by_update(), None, initial_state)
        o = o if updates == 1 else o.reshape(batch, length, updates, *o.shape[2:])[:, :, -1]
        return o.astype(v.dtype), final
    if form.name == "recurrent":
        return _recurrent(q, k, v, beta, log_decay, initial_state, starts, scale)
    assert form.chunk is not None
    o, final = time.run(DeltaRule(scale), max(1, form.chunk // updates), inputs, None, initial_state)
    return o.astype(v.dtype), final


def flops(heads: int, keys: int, values: int, updates: int = 1) -> int:
    """FLOPs of one token, forward. For each head, the read at the query (2 K V, decays left out). For each update, the read
    at the key, the write that replaces what was read (2 K V each), and the difference that is written (2 V). The additional
    work of chunks is not counted."""
    return heads * (2 * keys * values + updates * (2 * 2 * keys * values + 2 * values))


def choose(
    q: Any,
    k: Any,
    v: Any,
    beta: Any = None,
    log_decay: Any = None,
    *,
    chunk_size: int | None = None,
    backend: str | Form = "auto",
    negative_eigenvalues: bool = False,
    sharded: bool = False,
    **_: Any,
) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    by_channel = matrix_states.is_by_channel(log_decay)
    length = q.shape[1] * (k.shape[3] if k.ndim == 5 else 1)  # updates
    q = jax.ShapeDtypeStruct((q.shape[0], length, *q.shape[2:]), q.dtype)
    k, v = _one_update(k), _one_update(v)
    refused = functools.partial(refusal, q, k, v, chunk_size, by_channel, negative_eigenvalues=negative_eigenvalues)
    most = _CHANNEL_CHUNK if by_channel else matrix_states.CHUNK
    return matrix_states.choose(
        "delta_rule",
        backend,
        (q.shape, v.shape),
        refused,
        length=length,
        chunk_size=chunk_size,
        sharded=sharded,
        chunk=most,
    )


def _axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    by_head = (*TIME, axis)
    return {
        **dict.fromkeys(("q", "k", "v", "beta", "log_decay"), by_head),
        "initial_state": ("batch", axis),
        "segment_ids": TIME,
    }


def _complete(arrays: Arrays, form: Form) -> Arrays:
    if "initial_state" in arrays or not form.is_kernel:
        return arrays
    return arrays | {"initial_state": matrix_states.no_state(arrays["q"], arrays["k"], arrays["v"])}


def _check_updates(k: jax.Array, v: jax.Array, beta: jax.Array) -> int:
    """J. Raises ``UserError`` unless keys, values and beta have the same number of updates."""
    if k.ndim != 5:
        return 1
    updates = k.shape[3]
    if not updates or (v.ndim, *v.shape[3:4], *beta.shape[3:]) != (5, updates, updates):
        raise UserError(
            f"delta_rule: keys {k.shape}, values {v.shape} and beta {beta.shape} differ in the number of updates per "
            "token; they must be [B, T, H, J, K], [B, T, H, J, V] and [B, T, H, J]"
        )
    return updates


def _one_update(x: jax.Array) -> Any:
    """The shape and dtype of keys or values without the axis of updates."""
    return jax.ShapeDtypeStruct((*x.shape[:3], x.shape[4]), x.dtype) if x.ndim == 5 else x


def _recurrent(q, k, v, beta, log_decay, initial_state, starts, scale):
    """A loop over time."""
    wide = initial_state.dtype
    decay = jnp.exp(matrix_states.by_channel(log_decay, q.shape, wide))
    if starts is not None:
        decay = jnp.where(starts[:, :, None, None], jnp.zeros((), wide), decay)

    def update(state, kt, vt, bt):
        # The barrier keeps XLA for GPUs from computing this sum where it writes the state. The state could then not be
        # updated in place and would be copied in every step.
        new = lax.optimization_barrier(bt[..., None] * (vt - dtypes.product("bhkv,bhk->bhv", state, kt)))
        return state + kt[..., None] * new[:, :, None]

    def step(state, xs):
        qt, *given, at = xs
        state = at[..., None] * state
        each = [given] if beta.ndim == 3 else [[x[:, :, j] for x in given] for j in range(beta.shape[3])]
        for one in each:
            state = update(state, *one)
        return state, scale * dtypes.product("bhkv,bhk->bhv", state, qt)

    xs = [jnp.moveaxis(x.astype(wide), 1, 0) for x in (q, k, v, beta, decay)]
    final, o = lax.scan(step, initial_state, xs)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final


def refusal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chunk_size: int | None,
    by_channel: bool,
    platform: str,
    *,
    negative_eigenvalues: bool = False,
) -> str | None:
    """``matrix_states.refusal``."""
    terms = 2 if negative_eigenvalues and matrix_states.product_bytes(q, k, v) < 4 else 1  # as the plan has them
    most = blocks.gpu_chunk(k.shape[3], backends.target().gpu, terms) if platform == "gpu" else _MOST
    of_heads = functools.partial(_of_heads, by_channel=by_channel, terms=terms)
    return matrix_states.refusal(q, k, v, chunk_size, platform, chunks=(_LEAST, most), of_heads=of_heads)


def _of_heads(heads: int, widths: tuple[int, int], size: int, *, by_channel: bool, terms: int) -> str | None:
    of_block = blocks.heads_of(backends.target().kind, heads, *widths)
    if of_block > blocks.HEADS:
        return (
            f"the kernel takes at most {blocks.HEADS} heads at a time, and {heads} heads with K, V = {widths} "
            f"need {of_block} to fill registers of 128 lanes; multiples of 16 need fewer"
        )
    block = blocks.Heads(of_block, *widths, size, by_channel, terms)
    if not block.together():
        limit = f"{memory.VMEM_BYTES >> 20} MiB of VMEM and would need about {block.vmem(1) / 2**20:.0f}"
        return f"the kernel has {limit} for {of_block} heads with K, V = {widths}"
    return None


DELTA_RULE = Spec(
    delta_rule,
    choose,
    _axes,
    results=("q", "initial_state"),
    axis="heads",
    over_time="recurrence",
    complete=_complete,
)
