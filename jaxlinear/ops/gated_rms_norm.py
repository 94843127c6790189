"""The RMSNorm after a recurrence, over all channels or each head, with the gate beside it."""

import functools

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, matrix_states
from jaxlinear.pallas import derivatives, gated_rms_norm_gpu, gated_rms_norm_tpu
from jaxlinear.pallas.gated_rms_norm import Inputs, Norm
from jaxlinear.pallas.target import Target

ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}
_INSTEAD = "separate"  # of the kernel, where it does not run


@calls.recorded
def gated_rms_norm(
    x: jax.Array,
    gate: jax.Array,
    scale: jax.Array,
    skipped: jax.Array | None = None,
    skip: jax.Array | None = None,
    *,
    epsilon: float,
    heads: int = 1,
    norm_before_gate: bool = False,
    activation: str = "silu",
    backend: str = "auto",
) -> jax.Array:
    """``y = norm(r f(gate)) scale`` with ``r = x + skip skipped``, as in Mamba-2; or ``norm(r) scale f(gate)``.

    ``norm(n)`` is ``n / sqrt(mean(n^2) + epsilon)``, the mean over each head.

    Args:
      x, gate: ``[B, T, D]``.
      scale: ``[D / H]``, the same for all heads.
      skipped, skip: ``[B, T, D]`` and ``[D]``, or both None.
      heads: H, which divides D.
      norm_before_gate: the second form.
      activation: f, ``"silu"`` or ``"sigmoid"``.
      backend: ``"separate"`` (XLA), ``"pallas"`` (one kernel for TPU and GPU, interpreted on CPU) or ``"auto"``: the kernel
        on TPU and GPU for more than 8 tokens; where it does not run, that is logged once.

    Returns:
      ``[B, T, D]`` in the dtype of x, computed in float32 or wider.
    """
    x, gate, scale = (jnp.asarray(y) for y in (x, gate, scale))
    checks.axes("gated_rms_norm", "B T D", x=x)
    if (skipped is None) != (skip is None):
        raise UserError("gated_rms_norm takes skipped and skip together, or neither")
    if heads < 1 or x.shape[2] % heads:
        raise UserError(f"gated_rms_norm: {heads} heads do not divide {x.shape[2]} channels")
    if activation not in ACTIVATIONS:
        raise UserError(f"gated_rms_norm: activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    channels = x.shape[2:]
    expected = {"gate": (gate, x.shape), "scale": (scale, (x.shape[2] // heads,))}
    if skipped is not None and skip is not None:
        skipped, skip = jnp.asarray(skipped), jnp.asarray(skip)
        expected |= {"skipped": (skipped, x.shape), "skip": (skip, channels)}
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise UserError(f"gated_rms_norm: {name} is {array.shape}, not {shape}")
    wide = dtypes.wide(x.dtype)
    norm = Norm(x.shape[2] // heads, epsilon, norm_before_gate, activation)
    if choose(backend, x, norm.head) == _INSTEAD:
        r = x.astype(wide)
        if skipped is not None and skip is not None:
            r = r + skip.astype(wide)[None, None] * skipped.astype(wide)
        factor = ACTIVATIONS[activation](gate.astype(wide))
        n = (r if norm_before_gate else r * factor).reshape(*x.shape[:2], heads, -1)
        n = n * jax.lax.rsqrt(jnp.mean(n * n, axis=-1, keepdims=True) + epsilon) * scale.astype(wide)[None, None, None]
        y = n.reshape(x.shape)
        return (y * factor if norm_before_gate else y).astype(x.dtype)
    weights = [jnp.tile(scale, heads)] + ([] if skip is None else [skip])
    inputs = Inputs(x, gate, skipped, jnp.stack([y.astype(wide) for y in weights]))
    return _by_kernel(inputs, norm, backends.target())


def choose(backend: str, x: jax.Array | jax.ShapeDtypeStruct, head: int, elsewhere: str | None = None) -> str:
    """The backend that ``gated_rms_norm`` uses for x ``[B, T, D]``, that of one device, and heads of so many channels.
    ``elsewhere``: why there can be no kernel on a mesh, if there cannot."""

    def refusal(platform: str) -> str | None:
        refused = elsewhere or backends.refused_dtype(platform, x.dtype)
        return refused or _kernels(backends.target()).refusal(x.shape[2], head)

    few, how = x.shape[1] <= matrix_states.FEW_TOKENS, "as a norm and a gate"
    runs = backends.lone_kernel_runs("gated_rms_norm", backend, few, x.shape, refusal, instead=_INSTEAD, how=how)
    return "pallas" if runs else _INSTEAD


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _by_kernel(inputs: Inputs, norm: Norm, target: Target) -> jax.Array:
    return _kernels(target).forward(inputs, norm, target)


def _by_kernel_forward(inputs, norm, target):
    given = derivatives.once(inputs, _INSTEAD)
    return _kernels(target).forward(given, norm, target), given


def _by_kernel_backward(norm, target, given, d_y):
    given, d_y = derivatives.once((given, d_y), _INSTEAD)
    return (_kernels(target).gradient(given, d_y, norm, target),)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _kernels(target: Target):
    return gated_rms_norm_gpu if target.platform == "gpu" else gated_rms_norm_tpu
