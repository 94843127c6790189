"""The RMSNorm after a recurrence, over all channels or each head, with the gate beside it."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, heads, matrix_states
from jaxlinear.ops.backends import Form
from jaxlinear.ops.spec import TIME, Axes, Spec
from jaxlinear.pallas.gated_rms_norm import gpu as gated_rms_norm_gpu
from jaxlinear.pallas.gated_rms_norm import tpu as gated_rms_norm_tpu
from jaxlinear.pallas.gated_rms_norm.kernel import Inputs, Norm
from jaxlinear.pallas.parts import derivatives
from jaxlinear.pallas.parts.target import Target

ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}
_PLAIN = "separate"


@functools.partial(calls.recorded, choose=lambda **given: choose(**given))
def gated_rms_norm(
    x: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    skipped: jax.Array | None = None,
    skip: jax.Array | None = None,
    *,
    epsilon: float,
    norm_before_gate: bool = False,
    activation: str = "silu",
    backend: str | Form = "auto",
    shards: heads.Shards = (1, 1),
) -> jax.Array:
    """``y = norm(r f(gate)) scale`` with ``r = x + skip skipped``, as in Mamba-2; or ``norm(r) scale f(gate)``.

    ``norm(n)`` is ``n / sqrt(mean(n^2) + epsilon)``, the mean over each head of K channels.

    Args:
      x, gate: ``[B, T, D]``.
      scale: ``[K]``, the same for all heads; K divides D.
      skipped, skip: ``[B, T, D]`` and ``[D]``, or both None.
      norm_before_gate: the second form.
      activation: f, ``"silu"`` or ``"sigmoid"``.
      backend: ``"separate"`` (XLA), ``"pallas"`` (one kernel for TPU and GPU, interpreted on CPU) or ``"auto"``: the kernel
        on TPU and GPU for more than 8 tokens; where it does not run, that is logged once.
      shards: into how many parts a mesh divides T and D (``ops.heads``).

    Returns:
      ``[B, T, D]`` in the dtype of x, computed in float32 or wider.
    """
    x, gate, scale = (jnp.asarray(y) for y in (x, gate, scale))
    checks.axes("gated_rms_norm", "B T D", x=x)
    checks.axes("gated_rms_norm", "K", scale=scale)
    if (skipped is None) != (skip is None):
        raise UserError("gated_rms_norm takes skipped and skip together, or neither")
    head = scale.shape[0]
    if not head or x.shape[2] % head:
        raise UserError(f"gated_rms_norm: heads of {head} channels do not divide {x.shape[2]} channels")
    if activation not in ACTIVATIONS:
        raise UserError(f"gated_rms_norm: activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    expected = {"gate": (gate, x.shape)}
    if skipped is not None and skip is not None:
        skipped, skip = jnp.asarray(skipped), jnp.asarray(skip)
        expected |= {"skipped": (skipped, x.shape), "skip": (skip, x.shape[2:])}
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise UserError(f"gated_rms_norm: {name} is {array.shape}, not {shape}")
    dtype, wide, count = x.dtype, dtypes.wide(x.dtype), x.shape[2] // head
    if choose(x, gate, scale, backend=backend).is_kernel:
        weights = [jnp.tile(scale, count)] + ([] if skip is None else [skip])
        inputs = Inputs(x, gate, skipped, jnp.stack([y.astype(wide) for y in weights]))
        norm = Norm(head, epsilon, norm_before_gate, activation)
        return _by_kernel(inputs, norm, backends.target())
    if skipped is not None and skip is not None:
        x = x.astype(wide) + skip.astype(wide)[None, None] * skipped.astype(wide)
    factor = ACTIVATIONS[activation](gate.astype(wide))
    n = x if norm_before_gate else x.astype(wide) * factor
    if count > 1:
        n = heads.normalise(n, count, epsilon, weights=scale, shards=shards)
    else:
        n = n.astype(wide)
        n = n * jax.lax.rsqrt(jnp.mean(n * n, axis=-1, keepdims=True) + epsilon) * scale.astype(wide)[None, None]
    return (n * factor if norm_before_gate else n).astype(dtype)


def choose(x: Any, gate: Any, scale: Any, *, backend: str | Form = "auto", **_: Any) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    channels, head = x.shape[2], scale.shape[0]

    def refusal(platform: str) -> str | None:
        if channels % head:
            return f"the kernel needs whole heads, and a device has {channels} channels, of heads of {head}"
        return backends.refused_dtype(platform, x.dtype) or _kernels(backends.target()).refusal(channels, head)

    few = _PLAIN if x.shape[1] <= matrix_states.FEW_TOKENS else None
    forms = _PLAIN, "pallas"
    return backends.choose("gated_rms_norm", backend, forms, plain=_PLAIN, few=few, shapes=[x.shape], refusal=refusal)


def _axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    return {**dict.fromkeys(("x", "gate", "skipped"), (*TIME, axis)), "skip": (axis,), "scale": ()}


GATED_RMS_NORM = Spec(
    gated_rms_norm, choose, _axes, results=("x",), axis="heads", plain=_PLAIN, outputs=("output",), takes_shards=True
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _by_kernel(inputs: Inputs, norm: Norm, target: Target) -> jax.Array:
    return _kernels(target).forward(inputs, norm, target)


def _by_kernel_forward(inputs, norm, target):
    given = derivatives.once(inputs, _PLAIN)
    return _kernels(target).forward(given, norm, target), given


def _by_kernel_backward(norm, target, given, d_y):
    given, d_y = derivatives.once((given, d_y), _PLAIN)
    return (_kernels(target).gradient(given, d_y, norm, target),)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _kernels(target: Target):
    return gated_rms_norm_gpu if target.platform == "gpu" else gated_rms_norm_tpu
