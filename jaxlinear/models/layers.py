"""The pieces that every block is built from: linear maps, normalisation, rotary positions, the gated MLP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.ops import dtypes
from jaxlinear.parallel import sharding

Initializer = Callable[..., jax.Array]


def fan_in_normal(scale: float = 1.0) -> Initializer:
    """Normal with variance ``scale / fan_in``, the fan-in being the axis before the last."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        # Axes before that, as of the blocks of a block-diagonal matrix, are no part of the fan-in.
        others = tuple(range(len(shape) - 2))
        return nnx.initializers.variance_scaling(scale, "fan_in", "normal", batch_axis=others)(key, shape, dtype)

    return init


def parameter(init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...], rngs: nnx.Rngs) -> nnx.Param:
    """A float32 parameter with the logical axes by which it is placed on a mesh."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """``x @ kernel + bias``: ``[..., inputs]`` -> ``[..., outputs]``, in the dtype of x."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool = True,
        init: Initializer = fan_in_normal(),  # noqa: B008 (a pure function)
        rngs: nnx.Rngs,
    ):
        self.kernel = parameter(init, (inputs, outputs), axes, rngs)
        self.bias = parameter(nnx.initializers.zeros, (outputs,), axes[1:], rngs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.dot(x, self.kernel[...].astype(x.dtype))
        if self.bias is None:
            return y
        # Added in float32, so that the gradient of the bias is summed in float32.
        wide = y.astype(dtypes.wide(y.dtype))
        return (wide + _last(self.bias[...], wide)).astype(y.dtype)


class RMSNorm(nnx.Module):
    """``x / rms(x) * (1 + scale)`` over the last axis, in float32 inside (Zhang and Sennrich, arXiv:1910.07467)."""

    epsilon = 1e-6

    def __init__(self, width: int, *, axis: str = "embed", rngs: nnx.Rngs):
        self.scale = parameter(nnx.initializers.zeros, (width,), (axis,), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(dtypes.wide(x.dtype))
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * _last(1 + self.scale[...], wide)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """``down(gelu(x @ gate) * (x @ up))``, the channel mixing of Griffin (arXiv:2402.19427, section 2.2)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, inner = config.width, config.mlp_width
        self.gate = Linear(width, inner, axes=("embed", "mlp"), rngs=rngs)
        self.up = Linear(width, inner, axes=("embed", "mlp"), rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.down = Linear(inner, width, axes=("mlp", "embed"), init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jax.nn.gelu(self.gate(x)) * self.up(x)
        return self.down(sharding.constrain(inner, "batch", "time", "mlp"))


def rotary(x: jax.Array, positions: jax.Array, *, fraction: float, base: float = 10_000.0) -> jax.Array:
    """Rotates the first ``fraction`` of each head by its position (RoFormer, arXiv:2104.09864).

    Args:
      x: ``[B, T, H, K]``.
      positions: ``[B or 1, T]`` int32.
      fraction: of the K channels; the rest pass unturned. Channel i turns with channel i + fraction * K / 2.
    """
    half = int(x.shape[-1] * fraction) // 2
    if half == 0:
        return x
    frequencies = base ** (-np.arange(half, dtype=np.float64) / half)
    # The angle is taken in two parts, position = 1024 * high + low, since float32 cannot hold position * frequency to
    # a small fraction of a turn beyond about 10^5 positions.
    low, high = positions % 1024, positions // 1024
    per_high = jnp.asarray(np.mod(1024 * frequencies, 2 * np.pi), jnp.float32)
    angle_low = low[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    angle_high = high[..., None].astype(jnp.float32) * per_high[None, None]
    angle = (angle_low + angle_high)[:, :, None]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """``[D]`` as ``[1, ..., 1, D]`` in the dtype of x."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
