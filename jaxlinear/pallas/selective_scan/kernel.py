"""The selective scan, one kernel each way: forward, its summary, and its gradients.

    S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T,   y_t = S_t C_t,        with A None 1 - dt_t (B_t^T)^2 for exp(dt_t A)

The transitions and states of a token, N numbers for each of its channels, exist only in registers. Backward, with G_t the
gradient of S_t and a_t its transition,

    G_t = C_t dy_t + a_{t+1} G_{t+1},   dC_t = sum_d S_t dy_t,   d(dt_t x_t) = sum_n G_t B_t,   dB_t = sum_d G_t dt_t x_t,

and for the transition ``da_t = G_t S_{t-1}``, from which the gradients of dt_t and A, or of dt_t and B_t, follow. The
states are recomputed from those before blocks of time, which the forward pass keeps. ``selective_scan_tpu`` and
``selective_scan_gpu`` are the kernels; the functions here convert the arrays of ``jaxlinear.ops`` to those that the kernels
take, in which channels are last.

Shapes: x, dt ``[B, T, D]``; A ``[D, N]`` or None; B, C ``[B, T, N]``; states ``[B, D, N]``, whose dtype is the one to
compute in; ``starts`` ``[B, T]`` bool, where the state before the token is forgotten, or None.
"""

import jax

from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.selective_scan import gpu as selective_scan_gpu
from jaxlinear.pallas.selective_scan import tpu as selective_scan_tpu
from jaxlinear.pallas.selective_scan.plan import Arguments, Plan


def forward(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array | None,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    starts: jax.Array | None,
    *,
    keep: bool,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """y ``[B, T, D]`` in the dtype of x, the state after the run and, with ``keep``, the ``before`` of ``gradient``."""
    plan = Plan("forward", keep, A is not None, starts is not None)
    arguments = Arguments(x, dt, _turned(A, state), B, C, state.swapaxes(1, 2), starts)
    y, final, *before = _kernels(target).call(plan, arguments, target)
    return y, final.swapaxes(1, 2), before[0] if keep else None


def summary(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array | None,
    B: jax.Array,
    state: jax.Array,
    starts: jax.Array | None,
    *,
    target: Target,
) -> jax.Array:
    """The state after the run. No output is as long as the sequence."""
    plan = Plan("summary", False, A is not None, starts is not None)
    arguments = Arguments(x, dt, _turned(A, state), B, None, state.swapaxes(1, 2), starts)
    (final,) = _kernels(target).call(plan, arguments, target)
    return final.swapaxes(1, 2)


def gradient(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array | None,
    B: jax.Array,
    C: jax.Array,
    starts: jax.Array | None,
    before: jax.Array,
    d_y: jax.Array,
    d_final: jax.Array,
    *,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array, jax.Array]:
    """The gradients of x, dt, A (None if A is None), B, C and the state, from those of ``forward``'s outputs."""
    plan = Plan("gradient", False, A is not None, starts is not None)
    arguments = Arguments(x, dt, _turned(A, d_final), B, C, d_final.swapaxes(1, 2), starts, before, d_y)
    d_x, d_dt, d_B, d_C, d_state, *d_A = _kernels(target).call(plan, arguments, target)
    of_A = None if A is None else d_A[0].T.astype(A.dtype)
    of_time = (y.astype(like.dtype) for y, like in ((d_x, x), (d_dt, dt)))
    return *of_time, of_A, d_B.astype(B.dtype), d_C.astype(C.dtype), d_state.swapaxes(1, 2)


def state_gradient(
    dt: jax.Array,
    A: jax.Array | None,
    B: jax.Array,
    C: jax.Array,
    starts: jax.Array | None,
    d_y: jax.Array,
    d_final: jax.Array,
    *,
    target: Target,
) -> jax.Array:
    """The gradient of the state alone, as in ``gradient``. No output is as long as the sequence."""
    plan = Plan("state_gradient", False, A is not None, starts is not None)
    of_keys = None if plan.rates else B
    arguments = Arguments(None, dt, _turned(A, d_final), of_keys, C, d_final.swapaxes(1, 2), starts, None, d_y)
    (d_state,) = _kernels(target).call(plan, arguments, target)
    return d_state.swapaxes(1, 2)


def _kernels(target: Target):
    return selective_scan_gpu if target.platform == "gpu" else selective_scan_tpu


def _turned(A: jax.Array | None, state: jax.Array) -> jax.Array | None:
    """``[N, D]``, in the dtype to compute in."""
    return None if A is None else A.T.astype(state.dtype)
