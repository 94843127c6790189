"""Kernels of chunked linear attention S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t: forward, its
summary, its gradients, and the gradient of the state alone.

On TPU one kernel works within and between chunks and keeps the state resident; on GPU there is one for the states and one
for all chunks. All arrays keep the layout they have outside.

Shapes: q, k ``[B, T, H, K]`` and v ``[B, T, H, V]`` of one dtype; with no decay or one per head, q and k shared by all
heads may be ``[B, T, 1, K]``. log_decay None, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``; states ``[B, H, K, V]`` float32
(float64 interpreted); ``starts`` ``[B, T]`` bool, where the state before the token is forgotten, or None. ``platform`` of
the target is "tpu" or "gpu"; on any other the TPU kernel is interpreted.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.pallas.linear_attention import gpu as linear_attention_gpu
from jaxlinear.pallas.linear_attention import tpu as linear_attention_tpu
from jaxlinear.pallas.linear_attention.plan import Arguments, Plan
from jaxlinear.pallas.parts.target import Target


class Options(NamedTuple):
    """``chunk``: tokens of a chunk; None: by the table in ``blocks``."""

    scale: float
    chunk: int | None
    target: Target


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    starts: jax.Array | None


def forward(
    inputs: Inputs, state: jax.Array, options: Options, *, keep: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """o ``[B, T, H, V]``, the state after the last token and, with ``keep``, the states that ``gradient`` takes: before
    each block of time or, on GPU, before each chunk."""
    q, k, v, _, _ = inputs
    plan = _plan("forward", inputs, options, keep=keep)
    arguments = Arguments(_flat(k), _flat(v), _turned(state), queries=_flat(q), **_shared(inputs))
    o, *before, final = _call(plan, arguments, options)
    return o.reshape(v.shape), _turned(final), before[0] if keep else None


def summary(inputs: Inputs, dtype, options: Options) -> tuple[jax.Array, jax.Array]:
    """The map of a run: the share of the state before it that remains after it ``[B, H, K or 1]``, and the state after it
    from a zero state. No output is as long as the sequence."""
    batch, _, heads, values = inputs.v.shape
    none = jnp.zeros((batch, heads, values, inputs.k.shape[-1]), dtype)
    arguments = Arguments(_flat(inputs.k), _flat(inputs.v), none, **_shared(inputs))
    *kept, final = _call(_plan("summary", inputs, options), arguments, options)
    return (kept[0][:, :, 0] if kept else _kept(inputs, dtype)), _turned(final)


def gradient(
    inputs: Inputs, before: jax.Array, d_o: jax.Array, d_final: jax.Array, options: Options
) -> tuple[Inputs, jax.Array]:
    """The gradients of the inputs and of the state, from those of ``forward``'s outputs and the states that it kept."""
    q, k, v, log_decay, _ = inputs
    arguments = Arguments(
        _flat(k), _flat(v), _turned(d_final), queries=_flat(q), d_o=_flat(d_o), before=before, **_shared(inputs)
    )
    d_q, d_k, d_v, *d_log_decay, d_state = _call(_plan("gradient", inputs, options), arguments, options)
    of_decay = None if log_decay is None else d_log_decay[0].reshape(log_decay.shape).astype(log_decay.dtype)
    d_inputs = Inputs(d_q.reshape(q.shape), d_k.reshape(k.shape), d_v.reshape(v.shape), of_decay, None)
    return d_inputs, _turned(d_state)


def state_gradient(inputs: Inputs, d_o: jax.Array, d_final: jax.Array, options: Options) -> jax.Array:
    """The gradient of the state alone, as in ``gradient``. No output is as long as the sequence."""
    arguments = Arguments(_flat(inputs.q), _flat(d_o), _turned(d_final), **_shared(inputs))
    return _turned(_call(_plan("state_gradient", inputs, options), arguments, options)[0])


def _call(plan: Plan, arguments: Arguments, options: Options) -> list[jax.Array]:
    plan = dataclasses.replace(
        plan, length=arguments.keys.shape[1], narrow=arguments.keys.dtype, wide=arguments.state.dtype
    )
    kernel = linear_attention_gpu if options.target.platform == "gpu" else linear_attention_tpu
    return kernel.call(plan, arguments, options.target)


def _plan(kind: str, inputs: Inputs, options: Options, *, keep: bool = False) -> Plan:
    _, k, v, log_decay, starts = inputs
    decay = {0: "none", 1: "constant", 3: "scalar", 4: "channel"}[0 if log_decay is None else log_decay.ndim]
    packed = starts is not None
    heads, shared = v.shape[2], k.shape[2] != v.shape[2]
    return Plan(kind, heads, k.shape[3], v.shape[3], decay, packed, options.scale, options.chunk, keep, shared)


def _shared(inputs: Inputs) -> dict:
    log_decay = inputs.log_decay
    if log_decay is not None and log_decay.ndim == 4:
        log_decay = _flat(log_decay)
    return {"log_decay": log_decay, "starts": inputs.starts}


def _kept(inputs: Inputs, dtype) -> jax.Array:
    """The share of the state that remains ``[B, H, K or 1]``, from the log decays alone."""
    batch, length, heads, _ = inputs.v.shape
    total = jnp.zeros((batch, heads, 1), dtype)
    if inputs.log_decay is not None and inputs.log_decay.ndim == 1:
        total = total + (inputs.log_decay.astype(dtype) * jnp.asarray(length, dtype))[None, :, None]
    elif inputs.log_decay is not None:
        summed = jnp.sum(inputs.log_decay.astype(dtype), axis=1)
        total = summed if summed.ndim == 3 else summed[..., None]
    kept = jnp.exp(total)
    if inputs.starts is not None:
        kept = jnp.where(jnp.any(inputs.starts, axis=1)[:, None, None], jnp.zeros_like(kept), kept)
    return kept


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


def _turned(state: jax.Array) -> jax.Array:
    return state.swapaxes(-1, -2)
