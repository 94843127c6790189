"""The short convolution before a recurrence as a kernel: with its SiLU and, for queries and keys of the delta rule, each
head scaled to unit length.

    z_t = b + sum_j w_j x_{t-j},   y = z sigmoid(z),   u = y / sqrt(|y|^2 + epsilon)

A pass reads and writes each array once; backward it computes z again, and

    dy = (du - u (u . du)) / sqrt(|y|^2 + epsilon),   dz = dy sigmoid(z) (1 + z (1 - sigmoid(z))),
    dx_t = sum_j w_j dz_{t+j},   dw_j = sum_t dz_{t+j} x_t,   db = sum_t dz_t

``short_convolution_tpu`` and ``short_convolution_gpu`` are the kernels.
"""

import jax

from jaxlinear.pallas import short_convolution_gpu, short_convolution_tpu
from jaxlinear.pallas.target import Target


def refusal(channels: int, width: int, head: int, platform: str) -> str | None:
    """Why the kernel does not take so many channels, taps, or channels of a head, or None."""
    return (short_convolution_gpu if platform == "gpu" else short_convolution_tpu).refusal(channels, width, head)


def forward(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array,
    since: jax.Array,
    state: jax.Array,
    *,
    head: int,
    epsilon: float,
    target: Target,
) -> jax.Array:
    """y or u, ``[B, T, D]`` in the dtype of x.

    Args:
      x: ``[B, T, D]``.
      taps, bias: ``[width, D]``, the last for the present token, and ``[D]``, in the dtype to compute in.
      since: ``[B, T]`` int32, how many of the ``width - 1`` tokens before each belong to its document.
      state: ``[B, width - 1, D]``, those before the first.
      head, epsilon: channels of a head that gets unit length, 0 if none does; and what is added to its squared length.
      target: "tpu", "gpu" or, to interpret the kernel for TPU, another.
    """
    return _kernels(target).forward(x, taps, bias, since, state, head=head, epsilon=epsilon, target=target)


def gradient(
    x: jax.Array,
    taps: jax.Array,
    bias: jax.Array,
    since: jax.Array,
    state: jax.Array,
    d_y: jax.Array,
    *,
    head: int,
    epsilon: float,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of x, in its dtype, and of ``taps``, ``bias`` and ``state``, in theirs, from that of ``forward``'s
    output."""
    return _kernels(target).gradient(x, taps, bias, since, state, d_y, head=head, epsilon=epsilon, target=target)


def _kernels(target: Target):
    return short_convolution_gpu if target.platform == "gpu" else short_convolution_tpu
