"""The short convolution before a recurrence (``causal_convolution``), the SiLU after it, if there is one, and, for queries
and keys of the delta rule, the scaling of each head to unit length."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, heads, matrix_states
from jaxlinear.ops.backends import Form
from jaxlinear.ops.convolution import op as convolution
from jaxlinear.ops.convolution.op import CAUSAL_CONVOLUTION
from jaxlinear.ops.spec import TIME, Arrays, Axes, Spec, directly
from jaxlinear.pallas.parts import derivatives
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.short_convolution import gpu as short_convolution_gpu
from jaxlinear.pallas.short_convolution import tpu as short_convolution_tpu
from jaxlinear.pallas.short_convolution.kernel import After, Inputs

ACTIVATIONS = "silu", "none"
_PLAIN = "separate"


@functools.partial(calls.recorded, choose=lambda **given: choose(**given))
def short_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    activation: str = "silu",
    head_width: int | None = None,
    feeds_kernel: bool = True,
    backend: str | Form = "auto",
    shards: heads.Shards = (1, 1),
    call: Callable[[Spec], Callable[..., Any]] = directly,
) -> tuple[jax.Array, jax.Array]:
    """``y_t = f(bias + sum_j kernel[width-1-j] * x_{t-j})``; with ``head_width``, ``y / sqrt(|y|^2 + 1e-6)`` over heads.

    Args:
      x, kernel, bias, initial_state, segment_ids: as in ``causal_convolution``, but real; the state is its ``state``.
      activation: f, ``"silu"``, or ``"none"`` for the sum itself.
      head_width: channels of a head, which divide D; None for y itself.
      feeds_kernel: whether another kernel reads y. Where XLA's own work does, it fuses the convolution with that work.
      backend: ``"separate"`` (XLA), ``"pallas"`` (one kernel for TPU and GPU, interpreted on CPU) or ``"auto"``: the kernel
        for more than 8 tokens on TPU and, if there is an activation, on GPU, where y feeds a kernel; where it does not run,
        that is logged once.
      shards: into how many parts a mesh divides T and D (``ops.heads``).
      call: ``ops.spec.directly``.

    Returns:
      ``[B, T, D]`` in the dtype of x, and the state after the last token, as ``causal_convolution``.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    checks.axes("short_convolution", "B T D", x=x)
    if activation not in ACTIVATIONS:
        raise UserError(f"short_convolution: activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if head_width is not None and (head_width < 1 or x.shape[2] % head_width):
        raise UserError(f"short_convolution: heads of {head_width} channels do not divide {x.shape[2]} channels")
    form = choose(x, kernel, activation=activation, head_width=head_width, feeds_kernel=feeds_kernel, backend=backend)
    wide = dtypes.wide(x.dtype)
    if not form.is_kernel:
        y, final = call(CAUSAL_CONVOLUTION)(x, kernel, bias, initial_state, segment_ids=segment_ids)
        if activation == "silu":  # in float32: in bfloat16 it would round at each of its internal steps
            y = jax.nn.silu(y.astype(wide)).astype(x.dtype)
        return (y if head_width is None else heads.unit_length(y, y.shape[2] // head_width, shards=shards)), final
    x, kernel, bias, state, runs = convolution.arguments(x, kernel, bias, initial_state, segment_ids)
    bias = jnp.zeros(x.shape[2:], wide) if bias is None else bias.astype(wide)
    weights = jnp.concatenate([kernel.astype(wide), bias[None]])
    inputs = Inputs(x, weights, _since(x, runs, len(kernel) - 1), state)
    after = After(activation == "silu", head_width or 0, heads.UNIT_EPSILON)
    y = _by_kernel(inputs, after, backends.target())
    return y, convolution.last_inputs(x, state, runs)


def choose(
    x: Any,
    kernel: Any,
    *,
    activation: str = "silu",
    head_width: int | None = None,
    feeds_kernel: bool = True,
    backend: str | Form = "auto",
    sharded: bool = False,
    **_: Any,
) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    channels = x.shape[2]

    def refusal(platform: str) -> str | None:
        if sharded:
            return "the kernel needs whole rows, and mesh.sequence shards them"
        if channels % (head_width or 1):
            return f"the kernel needs whole heads, and a device has {channels} channels, of heads of {head_width}"
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            return "the kernel takes no complex numbers"
        reason = backends.refused_dtype(platform, x.dtype)
        return reason or _kernels(platform).refusal(channels, kernel.shape[0], head_width or 0)

    few = x.shape[1] <= matrix_states.FEW_TOKENS or not feeds_kernel
    # On GPU, a kernel of the sum alone moves no fewer bytes than XLA.
    few = few or (activation == "none" and backends.platform() == "gpu")
    forms, shapes = (_PLAIN, "pallas"), [x.shape]
    return backends.choose(
        "short_convolution", backend, forms, plain=_PLAIN, few=_PLAIN if few else None, shapes=shapes, refusal=refusal
    )


def _axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    return {
        "x": (*TIME, axis),
        "kernel": (None, axis),
        "bias": (axis,),
        "initial_state": ("batch", None, axis),
        "segment_ids": TIME,
    }


def _complete(arrays: Arrays, form: Form) -> Arrays:
    x, width = arrays["x"], arrays["kernel"].shape[0]
    return {"initial_state": jnp.zeros_like(x, shape=(x.shape[0], width - 1, x.shape[2]))} | arrays


SHORT_CONVOLUTION = Spec(
    short_convolution,
    choose,
    _axes,
    results=("x", "initial_state"),
    plain=_PLAIN,
    over_time="parts",
    complete=_complete,
    takes_shards=True,
)


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
    given = derivatives.once(inputs, _PLAIN)
    return _kernels(target.platform).forward(given, after, target), given


def _by_kernel_backward(after, target, given, d_y):
    given, d_y = derivatives.once((given, d_y), _PLAIN)
    d_x, d_weights, d_state = _kernels(target.platform).gradient(given, d_y, after, target)
    return (Inputs(d_x, d_weights, None, d_state),)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _kernels(platform: str):
    return short_convolution_gpu if platform == "gpu" else short_convolution_tpu
