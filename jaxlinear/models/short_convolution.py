"""The short convolution that precedes most recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.heads import unit_length
from jaxlinear.models.layers import ACTIVATIONS, parameter
from jaxlinear.ops import backends, dtypes
from jaxlinear.parallel import operations


class ShortConvolution(nnx.Module):
    """The causal convolution before a recurrence, one filter per channel, over ``[B, T, C]``, followed by SiLU and, if
    ``heads`` are given, by the scaling of each to unit length. State: the preceding inputs ``[B, width-1, C]``.

    ``kernel_on``: the platforms where all of this is one kernel. That moves fewer bytes if the result feeds another kernel;
    elsewhere XLA can fuse the steps with what follows.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        axis: str | None,
        bias: bool = False,
        kernel_on: tuple[str, ...] = (),
        rngs: nnx.Rngs,
    ):
        self.channels, self.width, self.axis, self.kernel_on = channels, width, axis, kernel_on
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
        kernel, axis = self.convolution_kernel[...], self.axis
        bias = None if self.convolution_bias is None else self.convolution_bias[...]
        given = x, kernel, bias, state
        if backends.platform() in self.kernel_on:
            found = operations.short_convolution(*given, segment_ids=segment_ids, channels=axis, heads=heads)
            if found is not None:
                return found
        y, state = operations.causal_convolution(*given, segment_ids=segment_ids, channels=axis)
        # In float32: in bfloat16 SiLU would round at each of its internal steps.
        y = ACTIVATIONS["silu"](y.astype(dtypes.wide(y.dtype))).astype(y.dtype)
        return (y if heads is None else unit_length(y, heads)), state
