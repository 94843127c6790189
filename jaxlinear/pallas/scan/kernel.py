"""Kernels of the diagonal recurrence h_t = a_t h_{t-1} + x_t, one each way: forward, its summary, and its gradients.

Each reads its inputs once and writes its outputs once, in their own layout ``[B, T, D]``. The functions here convert what
``jaxlinear.ops`` has (complex numbers, any trailing axes, a constant in time) into what the kernels take, parts
``[B, T, D]``; ``scan_tpu`` and ``scan_gpu`` are the kernels.

Shapes: a, x, h ``[B, T, ...]`` of one kind, real or complex; or a ``[...]``, constant in time. States ``[B, ...]``, whose
dtype is the one to compute in. ``starts`` ``[B, T]`` bool: where the state before the step is forgotten; or None.
``platform`` is "tpu" or "gpu"; on any other the TPU kernel is interpreted.
"""

import math

import jax
import jax.numpy as jnp

from jaxlinear.pallas.parts import complex_parts as parts
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.scan import gpu as scan_gpu
from jaxlinear.pallas.scan import tpu as scan_tpu
from jaxlinear.pallas.scan.plan import Arguments, Plan


def forward(
    a: jax.Array, x: jax.Array, state: jax.Array, starts: jax.Array | None, *, reverse: bool, target: Target
) -> tuple[jax.Array, jax.Array]:
    """h ``[B, T, ...]`` in the dtype of x, and the state after the last step taken ``[B, ...]``."""
    plan = _plan(a, x, starts, reverse=reverse, lagged=False, emit=True)
    outputs = _run(plan, target, a, x, state, starts)
    return outputs[0].reshape(x.shape), outputs[1].reshape(state.shape)


def summary(
    a: jax.Array, x: jax.Array, state: jax.Array, starts: jax.Array | None, *, target: Target
) -> tuple[jax.Array, jax.Array]:
    """The product of all a, zero where a document starts, and the state after the last step, both ``[B, ...]``. No output
    is as long as the sequence."""
    plan = _plan(a, x, starts, reverse=False, lagged=False, emit=False)
    product, final = _run(plan, target, a, x, state, starts)
    return product.reshape(state.shape), final.reshape(state.shape)


def gradient(
    a: jax.Array,
    h: jax.Array,
    state: jax.Array,
    starts: jax.Array | None,
    d_h: jax.Array,
    d_final: jax.Array,
    *,
    reverse: bool,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of a, x and state, from those of ``forward``'s outputs, one of which is h.

        g_t = dh_t + a_{t+1} g_{t+1},   dx_t = g_t,   da_t = g_t h_{t-1},   dh_{-1} = a_0 g_0

    without conjugates: JAX's gradient of a real function of x + iy is its derivative by x minus i times that by y.
    """
    plan = _plan(a, d_h, starts, reverse=not reverse, lagged=True, emit=True)
    d_x, d_a, d_state = _run(plan, target, a, d_h, d_final, starts, h, state)
    if plan.constant:
        d_a = _to_shape(jnp.sum(d_a, axis=(0, 1)).reshape(state.shape[1:]), a.shape).astype(a.dtype)
    return d_a.reshape(a.shape), d_x.reshape(d_h.shape), d_state.reshape(state.shape)


def state_gradient(
    a: jax.Array, d_h: jax.Array, d_final: jax.Array, starts: jax.Array | None, *, reverse: bool, target: Target
) -> jax.Array:
    """The gradient of the state alone, as in ``gradient``. No output is as long as the sequence."""
    plan = _plan(a, d_h, starts, reverse=not reverse, lagged=True, emit=False)
    return _run(plan, target, a, d_h, d_final, starts)[1].reshape(d_final.shape)


def _plan(a, x, starts, **fields) -> Plan:
    complex_ = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return Plan(parts=2 if complex_ else 1, constant=a.ndim < x.ndim, packed=starts is not None, **fields)


def _run(plan: Plan, target: Target, a, x, state, starts, h=None, before=None) -> list[jax.Array]:
    """The outputs of ``Plan.outputs``, with their parts joined."""
    trailing = x.shape[2:]
    flat = x.shape[:2] + (math.prod(trailing),)
    if plan.constant:
        a = jnp.broadcast_to(_aligned(a, len(trailing)), trailing).reshape(1, 1, -1)

    def rows(y):
        return () if y is None else parts.split(y.reshape(y.shape[0], -1))

    arguments = Arguments(
        a=parts.split(a if plan.constant else a.reshape(flat)),
        x=parts.split(x.reshape(flat)),
        state=rows(state),
        starts=starts,
        h=() if h is None else parts.split(h.reshape(flat)),
        before=rows(before),
    )
    kernel = scan_gpu if target.platform == "gpu" else scan_tpu
    outputs = kernel.call(plan, arguments, target)
    count = len(outputs) // plan.parts
    return [parts.join(tuple(outputs[i * plan.parts : (i + 1) * plan.parts])) for i in range(count)]


def _aligned(a: jax.Array, axes: int) -> jax.Array:
    return jnp.expand_dims(a, tuple(range(axes - a.ndim)))


def _to_shape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sum over the axes along which ``shape`` was broadcast."""
    x = jnp.sum(x, axis=tuple(range(x.ndim - len(shape))))
    return jnp.sum(x, axis=tuple(i for i, n in enumerate(shape) if n != x.shape[i]), keepdims=True)
