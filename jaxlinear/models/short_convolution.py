"""The short convolution that precedes most recurrences."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.heads import unit_length
from jaxlinear.models.layers import ACTIVATIONS, parameter
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations


class ShortConvolution(nnx.Module):
    """The causal convolution before a recurrence, one filter per channel, over ``[B, T, C]``, followed by SiLU and, if
    ``heads`` are given, by the scaling of each to unit length. State: the preceding inputs ``[B, width-1, C]``.

    ``feeds_kernel``: the result is the input of a kernel and of nothing else. On a TPU all of this is then a kernel, too;
    otherwise XLA, which can fuse its steps with what follows, moves fewer bytes.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        axis: str | None,
        bias: bool = False,
        feeds_kernel: bool = False,
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
        kernel, axis = self.convolution_kernel[...], self.axis
        bias = None if self.convolution_bias is None else self.convolution_bias[...]
        given = x, kernel, bias, state
        if self.feeds_kernel:
            found = operations.short_convolution(*given, segment_ids=segment_ids, channels=axis, heads=heads)
            if found is not None:
                return found
        y, state = operations.causal_convolution(*given, segment_ids=segment_ids, channels=axis)
        # In float32: in bfloat16 SiLU would round at each of its internal steps.
        y = ACTIVATIONS["silu"](y.astype(dtypes.wide(y.dtype))).astype(y.dtype)
        return (y if heads is None else unit_length(y, heads)), state
