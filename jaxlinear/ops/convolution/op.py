"""The short causal convolution that precedes most recurrences: one filter per channel."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.errors import UserError
from jaxlinear.ops import checks, dtypes, segments
from jaxlinear.ops.backends import Form
from jaxlinear.ops.spec import TIME, Axes, Spec


def causal_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``y_t = bias + sum_j kernel[width-1-j] * x_{t-j}``, each channel on its own, never across documents.

    Args:
      x: ``[B, T, D]``, real or complex; the other arrays may be complex only if x is.
      kernel: ``[width, D]``; ``kernel[-1]`` weighs the present token.
      bias: ``[D]`` or None.
      state: ``[B, width-1, D]``, the inputs before the first token (oldest first), of that token's document; None means
        zeros.
      segment_ids: ``[B, T]`` int.

    Returns:
      y ``[B, T, D]`` in the dtype of x, and the state after the last token ``[B, width-1, D]``: the latest inputs of the
      last document of each row, zeros where it is shorter than that.
    """
    x, kernel, bias, state, runs = arguments(x, kernel, bias, state, segment_ids)
    return _filter(x, kernel, bias, state, runs), last_inputs(x, state, runs)


def _axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    return {
        "x": (*TIME, axis),
        "kernel": (None, axis),
        "bias": (axis,),
        "state": ("batch", None, axis),
        "segment_ids": TIME,
    }


CAUSAL_CONVOLUTION = Spec(
    causal_convolution, lambda **_: Form("separate"), _axes, results=("x", "state"), over_time="halo"
)


def arguments(x, kernel, bias, state, segment_ids):
    """The arguments of ``causal_convolution``, checked: the state that is used, and ``segments.runs`` for the ids."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    bias, state = (None if y is None else jnp.asarray(y) for y in (bias, state))
    _check_shapes(x, kernel, bias, state)
    segment_ids = checks.segment_ids("causal_convolution", segment_ids, *x.shape[:2])
    if state is None:
        state = jnp.zeros_like(x, shape=(x.shape[0], kernel.shape[0] - 1, x.shape[2]))
    return x, kernel, bias, state.astype(x.dtype), None if segment_ids is None else segments.runs(segment_ids)


def last_inputs(x: jax.Array, state: jax.Array, runs: jax.Array | None) -> jax.Array:
    """The state after the last token."""
    length, before = x.shape[1], state.shape[1]
    final = jnp.concatenate([state, x], axis=1)[:, length:]
    if runs is None or not length:  # without tokens the state stays as it is
        return final
    same = jnp.pad(runs, ((0, 0), (before, 0)))[:, length:] == runs[:, -1:]
    return jnp.where(same[..., None], final, jnp.zeros((), x.dtype))


def _check_shapes(x, kernel, bias, state) -> None:
    checks.axes("causal_convolution", "B T D", x=x)
    checks.numbers("causal_convolution", complex_too=True, x=x)
    for name, y in (("kernel", kernel), ("bias", bias), ("state", state)):
        if y is not None and jnp.iscomplexobj(y) and not jnp.iscomplexobj(x):
            raise UserError(f"causal_convolution: the {name} is complex, x is real; make x complex")
    batch, _, channels = x.shape
    if kernel.ndim != 2 or kernel.shape[0] < 1 or kernel.shape[1] != channels:
        raise UserError(
            f"causal_convolution: the kernel {kernel.shape} does not fit x {x.shape}; it must be [width, D]"
        )
    if bias is not None and bias.shape != (channels,):
        raise UserError(f"causal_convolution: the bias {bias.shape} does not fit x {x.shape}; it must be [D]")
    before = batch, kernel.shape[0] - 1, channels
    if state is not None and state.shape != before:
        raise UserError(f"causal_convolution: the state is {state.shape}, not [B, width-1, D] = {before}")


@jax.custom_vjp
def _filter(x, kernel, bias, state, runs):
    """y, for documents ``runs [B, T]`` or None. It and its gradients are summed in float32 and rounded once; only the
    arguments are kept for the backward pass."""
    return _sums(x, kernel, bias, state, runs).astype(x.dtype)


def _sums(x, kernel, bias, state, runs):
    width, wide = len(kernel), dtypes.wide(x.dtype)
    y = jnp.zeros((), wide) if bias is None else bias.astype(wide)[None, None]
    for lag in range(width):
        y = y + _before(x, state, runs, lag).astype(wide) * kernel[width - 1 - lag].astype(wide)[None, None]
    return y


def _before(x, state, runs, lag):
    """The inputs ``lag`` before each token, zero where they belong to another document."""
    first = state.shape[1] - lag
    past = jnp.concatenate([state, x], axis=1)[:, first : first + x.shape[1]]
    return _where_same(past, runs, None if runs is None else jnp.pad(runs, ((0, 0), (lag, 0)))[:, : x.shape[1]])


def _after(dy, runs, lag):
    """The gradients ``lag`` after each token, zero where they belong to another document or there are none."""
    future = jnp.pad(dy, ((0, 0), (0, lag), (0, 0)))[:, lag:]
    return _where_same(future, runs, None if runs is None else jnp.pad(runs, ((0, 0), (0, lag)))[:, lag:])


def _where_same(x, runs, others):
    return x if runs is None else jnp.where((runs == others)[..., None], x, jnp.zeros((), x.dtype))


def _filter_forward(*arguments):
    return _filter(*arguments), arguments


def _filter_backward(arguments, dy):
    """Shifts and sums like those of y: they take XLA fewer passes over memory than their transposes, which pad."""
    x, kernel, bias, state, runs = arguments
    width, wide, own = len(kernel), dtypes.wide(x.dtype), jnp.finfo(dy.dtype)
    if not jnp.iscomplexobj(dy):  # whose precision JAX does not reduce
        # Without this, XLA would use, and keep, the float32 values that dy was rounded from.
        dy = lax.reduce_precision(dy, own.nexp, own.nmant)
    dx, d_kernel = jnp.zeros((), wide), []
    for lag in range(width):
        dx = dx + _after(dy, runs, lag).astype(wide) * kernel[width - 1 - lag].astype(wide)[None, None]
    for lag in reversed(range(width)):
        d_kernel.append(jnp.sum(_before(x, state, runs, lag).astype(wide) * dy.astype(wide), axis=(0, 1)))
    d_bias = None if bias is None else _like(bias, jnp.sum(dy.astype(wide), axis=(0, 1)))

    head = lambda y: None if y is None else y[:, : width - 1]  # noqa: E731
    of_state = lambda state: _sums(head(x).astype(wide), kernel, None, state, head(runs))  # noqa: E731
    (d_state,) = jax.vjp(of_state, state.astype(wide))[1](head(dy).astype(wide))
    return dx.astype(x.dtype), _like(kernel, jnp.stack(d_kernel)), d_bias, d_state.astype(state.dtype), None


def _like(weights, gradient):
    """The gradient, or its real part for real weights of complex inputs, in the dtype of the weights."""
    return (gradient if jnp.iscomplexobj(weights) else jnp.real(gradient)).astype(weights.dtype)


_filter.defvjp(_filter_forward, _filter_backward)
