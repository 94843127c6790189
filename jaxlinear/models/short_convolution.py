"""The short convolution that precedes most recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.layers import parameter
from jaxlinear.parallel import operations


class ShortConvolution(nnx.Module):
    """The causal convolution before a recurrence, one filter per channel, over ``[B, T, C]``, followed by SiLU and, if
    ``heads`` are given, by the scaling of each to unit length. State: the preceding inputs ``[B, width-1, C]``.

    ``feeds_kernel``: whether another kernel reads the result. Otherwise XLA can fuse the steps with what follows.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        axis: str | None,
        bias: bool = False,
        feeds_kernel: bool,
        rngs: nnx.Rngs,
    ):
        self.channels, self.width, self.axis, self.feeds_kernel = channels, width, axis, feeds_kernel
        # Uniform within 1 / sqrt(fan-in), where the fan-in of a channel's filter is its width.
        bound = width**-0.5
        init = nnx.initializers.uniform(2 * bound)
        self.convolution_kernel = parameter(
            lambda key, shape, dtype: init(key, shape, dtype) - bound, (width, channels), (None, axis), rngs
        )
        self.convolution_bias = parameter(nnx.initializers.zeros, (channels,), (axis,), rngs) if bias else None

    def init_state(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch, self.width - 1, self.channels), dtype)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None, state: jax.Array | None, heads: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        return operations.short_convolution(
            x,
            self.convolution_kernel[...],
            None if self.convolution_bias is None else self.convolution_bias[...],
            state,
            segment_ids=segment_ids,
            head_width=None if heads is None else self.channels // heads,
            feeds_kernel=self.feeds_kernel,
            channels=self.axis,
        )
