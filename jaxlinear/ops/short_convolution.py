"""The short convolution before a recurrence (``causal_convolution``), the SiLU after it, if there is one, and, for queries
and keys of the delta rule, the scaling of each head to unit length."""

import functools

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, convolution, dtypes, matrix_states
from jaxlinear.pallas import derivatives, short_convolution_gpu, short_convolution_tpu
from jaxlinear.pallas.short_convolution import After, Inputs
from jaxlinear.pallas.target import Target

UNIT_EPSILON = 1e-6  # added to the squared length of a query or a key
ACTIVATIONS = "silu", "none"
_INSTEAD = "separate"  # of the kernel, where it does not run


@calls.recorded
def short_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    activation: str = "silu",
    heads: int | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """``y_t = f(bias + sum_j kernel[width-1-j] * x_{t-j})``; with ``heads``, ``y / sqrt(|y|^2 + 1e-6)`` over each.

    Args:
      x, kernel, bias, initial_state, segment_ids: as in ``causal_convolution``, but real; the state is its ``state``.
      activation: f, ``"silu"``, or ``"none"`` for the sum itself.
      heads: H, which divides D; None for y itself.
      backend: ``"separate"`` (XLA), ``"pallas"`` (one kernel for TPU and GPU, interpreted on CPU) or ``"auto"``: the kernel
        on TPU and GPU for more than 8 tokens; where it does not run, that is logged once.

    Returns:
      ``[B, T, D]`` in the dtype of x, and the state after the last token, as ``causal_convolution``.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    checks.axes("short_convolution", "B T D", x=x)
    if activation not in ACTIVATIONS:
        raise UserError(f"short_convolution: activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if heads is not None and (heads < 1 or x.shape[2] % heads):
        raise UserError(f"short_convolution: {heads} heads do not divide {x.shape[2]} channels")
    if choose(backend, x, kernel, heads) == _INSTEAD:
        y, final = convolution.causal_convolution(x, kernel, bias, initial_state, segment_ids=segment_ids)
        y = y.astype(dtypes.wide(y.dtype))
        if activation == "silu":
            y = jax.nn.silu(y)
        if heads is not None:
            of_heads = y.reshape(*y.shape[:2], heads, -1)
            square = jnp.sum(of_heads * of_heads, axis=-1, keepdims=True)
            y = (of_heads * jax.lax.rsqrt(square + UNIT_EPSILON)).reshape(y.shape)
        return y.astype(x.dtype), final
    wide = dtypes.wide(x.dtype)
    x, kernel, bias, state, runs = convolution.arguments(x, kernel, bias, initial_state, segment_ids)
    bias = jnp.zeros(x.shape[2:], wide) if bias is None else bias.astype(wide)
    weights = jnp.concatenate([kernel.astype(wide), bias[None]])
    inputs = Inputs(x, weights, _since(x, runs, len(kernel) - 1), state)
    after = After(activation == "silu", 0 if heads is None else x.shape[2] // heads, UNIT_EPSILON)
    y = _by_kernel(inputs, after, backends.target())
    return y, convolution.last_inputs(x, state, runs)


def choose(
    backend: str,
    x: jax.Array | jax.ShapeDtypeStruct,
    kernel: jax.Array | jax.ShapeDtypeStruct,
    heads: int | None,
    elsewhere: str | None = None,
) -> str:
    """The backend that ``short_convolution`` uses for x ``[B, T, D]`` and a kernel ``[width, D]``, those of one device.
    ``elsewhere``: why there can be no kernel on a mesh, if there cannot."""
    few, refusal = x.shape[1] <= matrix_states.FEW_TOKENS, functools.partial(_refusal, x, kernel, heads, elsewhere)
    how = "as a convolution and what follows it"
    runs = backends.lone_kernel_runs("short_convolution", backend, few, x.shape, refusal, instead=_INSTEAD, how=how)
    return "pallas" if runs else _INSTEAD


def _refusal(
    x: jax.Array | jax.ShapeDtypeStruct,
    kernel: jax.Array | jax.ShapeDtypeStruct,
    heads: int | None,
    elsewhere: str | None,
    platform: str,
) -> str | None:
    """Why the kernel does not run, or None."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return "the kernel takes no complex numbers"
    head = 0 if heads is None else x.shape[2] // heads
    reason = elsewhere or backends.refused_dtype(platform, x.dtype)
    return reason or _kernels(platform).refusal(x.shape[2], kernel.shape[0], head)


def _since(x: jax.Array, runs: jax.Array | None, before: int) -> jax.Array:
    """``[B, T]`` int32: how many of the ``before`` tokens before each belong to its document."""
    if runs is None:
        return jnp.full(x.shape[:2], before, jnp.int32)
    earlier = (jnp.pad(runs, ((0, 0), (lag, 0)))[:, : runs.shape[1]] for lag in range(1, before + 1))
    return sum(((y == runs).astype(jnp.int32) for y in earlier), jnp.zeros(runs.shape, jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _by_kernel(inputs: Inputs, after: After, target: Target) -> jax.Array:
    return _kernels(target.platform).forward(inputs, after, target)


def _by_kernel_forward(inputs, after, target):
    given = derivatives.once(inputs, _INSTEAD)
    return _kernels(target.platform).forward(given, after, target), given


def _by_kernel_backward(after, target, given, d_y):
    given, d_y = derivatives.once((given, d_y), _INSTEAD)
    d_x, d_weights, d_state = _kernels(target.platform).gradient(given, d_y, after, target)
    return (Inputs(d_x, d_weights, None, d_state),)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _kernels(platform: str):
    return short_convolution_gpu if platform == "gpu" else short_convolution_tpu
