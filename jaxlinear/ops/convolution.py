"""The short causal convolution that stands before most recurrences: one filter a channel."""

import jax
import jax.numpy as jnp

from jaxlinear.ops import dtypes, segments


def causal_convolution(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``y_t = bias + sum_j kernel[width-1-j] * x_{t-j}``, each channel by itself, never across documents.

    Args:
      x: ``[B, T, D]``.
      kernel: ``[width, D]``; ``kernel[-1]`` weighs the present token.
      bias: ``[D]`` or None.
      state: ``[B, width-1, D]``, the inputs before the first token (oldest first); None means zeros. It belongs to
        the document of the first token.
      segment_ids: ``[B, T]`` int.

    Returns:
      y ``[B, T, D]`` in the dtype of x, and the state after the last token ``[B, width-1, D]``: the inputs of the
      last document of each row, zeros where it is shorter than that.
    """
    width, length = kernel.shape[0], x.shape[1]
    if state is None:
        state = jnp.zeros_like(x, shape=(x.shape[0], width - 1, x.shape[2]))
    padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
    ids = None
    if segment_ids is not None:
        ids = jnp.pad(segments.runs(segment_ids), ((0, 0), (width - 1, 0)))

    y = _weigh(x, kernel[-1])
    for lag in range(1, width):
        past = padded[:, width - 1 - lag : width - 1 - lag + length]
        if ids is not None:
            same = ids[:, width - 1 - lag : width - 1 - lag + length] == ids[:, width - 1 :]
            past = jnp.where(same[..., None], past, jnp.zeros((), x.dtype))
        y = y + _weigh(past, kernel[width - 1 - lag])
    if bias is not None:
        wide = dtypes.wide(x.dtype)  # in which the gradient of the bias is then summed
        y = (y.astype(wide) + bias.astype(wide)[None, None]).astype(x.dtype)

    final = padded[:, length:]
    if ids is not None:
        same = ids[:, length:] == ids[:, -1:]
        final = jnp.where(same[..., None], final, jnp.zeros((), x.dtype))
    return y, final


@jax.custom_vjp
def _weigh(x, weight):
    """``x * weight``, ``[B, T, D]`` by ``[D]``, in the dtype of x; the gradient of the weight is summed in float32."""
    return x * weight.astype(x.dtype)[None, None]


def _weigh_forward(x, weight):
    return _weigh(x, weight), (x, weight)


def _weigh_backward(residuals, dy):
    x, weight = residuals
    d_weight = jnp.sum(x * dy, axis=(0, 1), dtype=dtypes.wide(x.dtype))
    return dy * weight.astype(x.dtype)[None, None], d_weight.astype(weight.dtype)


_weigh.defvjp(_weigh_forward, _weigh_backward)
