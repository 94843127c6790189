"""The chunked delta rule as kernels: forward, its summary, its gradients, and the gradient of the state alone.

    S' = diag(exp(log_decay_t)) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,   o_t = scale S_t^T q_t

One kernel works within and between chunks and keeps the state resident. All arrays keep the layout they have outside.

Shapes: q, k ``[B, T, H, K]``; v ``[B, T, H, V]``; beta ``[B, T, H]``; log_decay None, ``[B, T, H]`` or ``[B, T, H, K]``;
states ``[B, H, K, V]`` float32 (float64 interpreted); ``starts`` ``[B, T]`` bool, where the state before the token is
forgotten, or None. ``platform`` of the target is "tpu" or "gpu"; on any other the TPU kernel is interpreted.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.pallas.delta_rule import gpu as delta_rule_gpu
from jaxlinear.pallas.delta_rule import tpu as delta_rule_tpu
from jaxlinear.pallas.delta_rule.plan import Arguments, Plan
from jaxlinear.pallas.parts.target import Target


class Options(NamedTuple):
    """As ``linear_attention.Options``, and whether beta |k|^2 may exceed 1."""

    scale: float
    chunk: int | None
    target: Target
    negative_eigenvalues: bool = False


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    log_decay: jax.Array | None
    starts: jax.Array | None


def forward(
    inputs: Inputs, state: jax.Array, options: Options, *, keep: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """o ``[B, T, H, V]`` in the dtype of v, the state after the last token and, with ``keep``, the states that ``gradient``
    takes: ``[B, N, H, V, K]``, before each chunk, in the dtype of the products."""
    arguments = _arguments(inputs, state)._replace(q=_flat(inputs.q), v=_flat(inputs.v))
    found = _call("forward", inputs, arguments, options, keep=keep)
    return found["o"].reshape(inputs.v.shape), _turned(found["final"]), found.get("before")


def summary(inputs: Inputs, dtype, options: Options) -> tuple[jax.Array, jax.Array]:
    """The map of a run, M ``[B, H, K, K]`` and C ``[B, H, K, V]``, in ``dtype``: the state after the run is M S + C. No
    output is as long as the sequence."""
    batch, _, heads, width = inputs.k.shape
    none = jnp.zeros((batch, heads, width, inputs.v.shape[-1]), dtype)
    arguments = _arguments(inputs, none)._replace(v=_flat(inputs.v))
    found = _call("summary", inputs, arguments, options)
    return _turned(found["transition"]), _turned(found["final"])


def gradient(
    inputs: Inputs, before: jax.Array, d_o: jax.Array, d_final: jax.Array, options: Options
) -> tuple[Inputs, jax.Array]:
    """The gradients of the inputs and of the state, from those of ``forward``'s outputs and the states that it kept."""
    arguments = _arguments(inputs, d_final)._replace(
        q=_flat(inputs.q), v=_flat(inputs.v), d_o=_flat(d_o), before=before
    )
    found = _call("gradient", inputs, arguments, options)

    def of(name: str) -> jax.Array:
        x = getattr(inputs, name)
        return found["d_" + name].reshape(x.shape).astype(x.dtype)

    d_log_decay = None if inputs.log_decay is None else of("log_decay")
    return Inputs(of("q"), of("k"), of("v"), of("beta"), d_log_decay, None), _turned(found["d_state"])


def state_gradient(inputs: Inputs, d_o: jax.Array, d_final: jax.Array, options: Options) -> jax.Array:
    """The gradient of the state alone, as in ``gradient``. No output is as long as the sequence."""
    arguments = _arguments(inputs, d_final)._replace(q=_flat(inputs.q), d_o=_flat(d_o))
    return _turned(_call("state_gradient", inputs, arguments, options)["d_state"])


def _arguments(inputs: Inputs, state: jax.Array) -> Arguments:
    log_decay = inputs.log_decay
    if log_decay is not None and log_decay.ndim == 4:
        log_decay = _flat(log_decay)
    return Arguments(_flat(inputs.k), inputs.beta, _turned(state), log_decay=log_decay, starts=inputs.starts)


def _call(kind: str, inputs: Inputs, arguments: Arguments, options: Options, *, keep: bool = False):
    q, k, v, _, log_decay, starts = inputs
    plan = Plan(
        kind=kind,
        length=k.shape[1],
        heads=k.shape[2],
        key_width=k.shape[3],
        value_width=v.shape[3],
        decay="none" if log_decay is None else {3: "scalar", 4: "channel"}[log_decay.ndim],
        packed=starts is not None,
        scale=options.scale,
        narrow=functools.reduce(np.promote_types, (q.dtype, k.dtype, v.dtype)),
        wide=arguments.state.dtype,
        chunk=options.chunk,
        keep=keep,
        negative_eigenvalues=options.negative_eigenvalues,
    )
    kernel = delta_rule_gpu if options.target.platform == "gpu" else delta_rule_tpu
    return kernel.call(plan, arguments, options.target)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1)


def _turned(state: jax.Array) -> jax.Array:
    return state.swapaxes(-1, -2)
