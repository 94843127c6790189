"""The short convolution before a recurrence as a kernel: with its SiLU, if it has one, and, for queries and keys of the
delta rule, each head scaled to unit length.

    z_t = b + sum_j w_j x_{t-j},   y = z sigmoid(z), or z,   u = y / sqrt(|y|^2 + epsilon)

A pass reads and writes each array once; backward it computes z again, unless u is z, and

    dy = (du - u (u . du)) / sqrt(|y|^2 + epsilon),   dz = dy sigmoid(z) (1 + z (1 - sigmoid(z))), or dy
    dx_t = sum_j w_j dz_{t+j},   dw_j = sum_t dz_{t+j} x_t,   db = sum_t dz_t

``short_convolution_tpu`` and ``short_convolution_gpu`` are the kernels.
"""

from typing import NamedTuple

import jax


class Inputs(NamedTuple):
    """Of one device. The gradients of all but ``since`` have the same shapes and dtypes.

    x: ``[B, T, D]``.
    weights: ``[width + 1, D]``, the taps, the last for the present token, and b, in the dtype to compute in.
    since: ``[B, T]`` int32, how many of the ``width - 1`` tokens before each belong to its document.
    state: ``[B, width - 1, D]``, those before the first.
    """

    x: jax.Array
    weights: jax.Array
    since: jax.Array
    state: jax.Array

    @property
    def width(self) -> int:
        return len(self.weights) - 1


class After(NamedTuple):
    """What follows the sum."""

    silu: bool
    head: int  # channels of a head that gets unit length; 0 if none does
    epsilon: float  # added to its squared length

    @property
    def is_linear(self) -> bool:
        return not (self.silu or self.head)
