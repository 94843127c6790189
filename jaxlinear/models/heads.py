"""What is done to each head by itself: how many channels it has, norms over them, and factors.

Norms and factors take ``[B, T, H * K]``. On a TPU the last two axes of an array lie in memory in tiles of 8 x 128: there a
tile is 8 tokens of 128 channels, but in ``[B, T, H, K]`` 8 heads of one token. XLA copies an array, most often in float32,
from one to the other before a sum over K, and back after it; the gradient of a factor is such a sum, too. So sums are taken
there over axes that are the tiles themselves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.layers import RMSNorm
from jaxlinear.ops import backends, dtypes
from jaxlinear.ops.gated_rms_norm import ACTIVATIONS
from jaxlinear.ops.short_convolution import UNIT_EPSILON
from jaxlinear.pallas.lanes import LANES, SUBLANES
from jaxlinear.parallel import operations, sharding

_FEWEST = 32  # channels of a head: with more heads in a register, their sums would take longer than the copies


def per_head(mixer: str, channels: int, heads: int) -> int:
    """Channels per head, if the config does not give them."""
    if not channels or channels % heads:  # half of a width of 1 is 0
        raise UserError(
            f"{mixer}: {heads} heads do not divide {channels} channels; change model.recurrent_heads or model.num_heads, "
            "or set model.key_width and model.value_width"
        )
    return channels // heads


def by_head(x: jax.Array, heads: int, *inner: int) -> jax.Array:
    """``[B, T, H * K]`` -> ``[B, T, H, K]``, with the heads spread over the mesh; or ``[B, T, H, *inner, K]``."""
    x = x.reshape(*x.shape[:2], heads, *inner, -1)
    return sharding.constrain(x, "batch", "time", "heads", *(None,) * (x.ndim - 3))


class HeadNorm(RMSNorm):
    """``RMSNorm`` over each head of ``[B, T, H * K]``, with the same weights for all; the result in ``dtype``, by default
    that of x."""

    def __init__(self, channels: int, *, epsilon: float, offset: float, rngs: nnx.Rngs):
        super().__init__(channels, axis=None, epsilon=epsilon, offset=offset, rngs=rngs)

    def __call__(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        heads = x.shape[-1] // self.scale.shape[0]
        x = _placed(x, heads, shared=False)
        y = _normalised(x, heads, self.epsilon, weights=self.factors)
        return y.astype(dtype or x.dtype)

    def gated(self, x: jax.Array, gate: jax.Array, activation: str = "silu") -> jax.Array:
        """The norm times the activation of ``gate``, both ``[B, T, H * K]``: one kernel where that runs."""
        heads, wide = x.shape[-1] // self.scale.shape[0], dtypes.wide(x.dtype)
        run = functools.partial(operations.gated_rms_norm, channels="heads", heads=heads, epsilon=self.epsilon)
        y = run(x, gate, self.factors, norm_before_gate=True, activation=activation)
        return (self(x, wide) * ACTIVATIONS[activation](gate.astype(wide))).astype(x.dtype) if y is None else y


class GroupNorm(nnx.Module):
    """Mean 0 and variance 1 over each of ``heads`` heads of ``[B, T, H * K]``."""

    def __init__(self, heads: int, epsilon: float):
        self.heads, self.epsilon = heads, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalised(_placed(x, self.heads), self.heads, self.epsilon, centred=True).astype(x.dtype)


def unit_length(x: jax.Array, heads: int) -> jax.Array:
    """``x / |x|`` over each head of ``[B, T, H * K]``, in float32 internally; zeros stay zeros."""
    # |x| is the root of the sum of squares, not of their mean.
    return _placed(_normalised(x, heads, UNIT_EPSILON, count=1).astype(x.dtype), heads)


def scale_heads(x: jax.Array, scales: jax.Array) -> jax.Array:
    """Each head of ``[B, T, H * K]`` times its own number ``[B, T, H]``, in the dtype of ``scales`` internally."""
    heads = scales.shape[-1]
    view = _view(x.shape, heads, True)
    y = view.split(x.astype(scales.dtype)) * view.spread(view.of_heads(scales))
    return _placed(view.joined(y).reshape(x.shape).astype(x.dtype), heads)


def _placed(x: jax.Array, heads: int, *, shared: bool = True) -> jax.Array:
    """x, as ``[B, T, H * K]`` in memory if sums are over tiles. XLA could compute it as the ``[B, T, H, K]`` that a mesh
    places before or after it, and would then copy it."""
    return jax.lax.optimization_barrier(x) if isinstance(_view(x.shape, heads, shared), _Tiles) else x


def _normalised(
    x: jax.Array,
    heads: int,
    epsilon: float,
    *,
    count: int = 0,
    centred: bool = False,
    weights: jax.Array | None = None,
) -> jax.Array:
    """``x / sqrt(sum / count + epsilon)`` with the sum of the squares of each head of ``[B, T, H * K]``, by default their
    mean, in float32 or wider; ``centred``: with each head's mean subtracted from x. ``weights``: ``[K]``, factors."""
    channels, view = x.shape[-1] // heads, _view(x.shape, heads, weights is None)
    y = view.split(x.astype(dtypes.wide(x.dtype)))
    if centred:
        y = y - view.spread(view.sums(y) / channels)
    y = y * view.spread(jax.lax.rsqrt(view.sums(y * y) / (count or channels) + epsilon))
    if weights is not None:
        y = view.weighted(y, weights.astype(y.dtype))
    return view.joined(y).reshape(x.shape)


class _LastAxis:
    """Sums over the last axis of ``[B, T, H, K]``."""

    def __init__(self, heads: int):
        self.heads = heads

    def split(self, x: jax.Array) -> jax.Array:
        return by_head(x, self.heads)

    def joined(self, y: jax.Array) -> jax.Array:
        return y

    spread = joined

    def of_heads(self, y: jax.Array) -> jax.Array:
        return y[..., None]

    def sums(self, y: jax.Array) -> jax.Array:
        return jnp.sum(y, axis=-1, keepdims=True)

    def weighted(self, y: jax.Array, weights: jax.Array) -> jax.Array:
        return y * weights[None, None, None]


class _Tiles:
    """Sums over heads in views ``[B, T/8, d, R, 8, 128]``: d devices, each with R registers of 128 channels.

    A register's heads are numbered from 0: its own first, second, ... head. ``masks``: by number, the channels ``[R, 128]``
    of that head. ``belongs``: by number, the head of the device ``[R, H]`` that it is.
    """

    def __init__(self, channels: int, every: int, devices: int):
        """``every``: channels of a device."""
        self.channels, self.devices, self.registers = channels, devices, every // LANES
        heads = np.arange(every).reshape(-1, LANES) // channels
        number = heads - heads[:, :1]
        numbers = range(number.max() + 1)
        self.masks = [(number == n)[None, None, None, :, None] for n in numbers]
        self.belongs = [heads[:, :1] + n == np.arange(every // channels) for n in numbers]
        self.alone = self.registers == every // channels and len(numbers) == 1  # each register is a head

    def split(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1, SUBLANES, self.devices, self.registers, LANES)
        return x.transpose(0, 1, 3, 4, 2, 5)

    def joined(self, y: jax.Array) -> jax.Array:
        return y.transpose(0, 1, 4, 2, 3, 5)

    def of_heads(self, y: jax.Array) -> jax.Array:
        """``[B, T, d * H]`` -> ``[B, T/8, d, H, 8]``, as ``sums`` has it."""
        return y.reshape(y.shape[0], -1, SUBLANES, self.devices, y.shape[2] // self.devices).transpose(0, 1, 3, 4, 2)

    def sums(self, y: jax.Array) -> jax.Array:
        """``[B, T/8, d, H, 8]``."""
        if self.alone:
            return jnp.sum(y, axis=-1)
        zero, total = jnp.zeros((), y.dtype), jnp.zeros((), y.dtype)
        for mask, belongs in zip(self.masks, self.belongs, strict=True):
            part = y if len(self.masks) == 1 else jnp.where(mask, y, zero)
            total = total + _product("btdrs,rh->btdhs", jnp.sum(part, axis=-1), belongs)
        return total

    def spread(self, of_heads: jax.Array) -> jax.Array:
        """At each channel, the value of its head."""
        if self.alone:
            return of_heads[..., None]
        spread, *others = (_product("btdhs,rh->btdrs", of_heads, belongs)[..., None] for belongs in self.belongs)
        for mask, values in zip(self.masks[1:], others, strict=True):
            spread = jnp.where(mask, values, spread)
        return spread

    def weighted(self, y: jax.Array, weights: jax.Array) -> jax.Array:
        # Not repeated for each head: devices would sum the gradients of all repetitions.
        registers = self.channels // LANES
        of_heads = y.reshape(*y.shape[:3], -1, registers, *y.shape[4:])
        return (of_heads * weights.reshape(1, 1, 1, 1, registers, 1, LANES)).reshape(y.shape)


def _product(subscripts: str, x: jax.Array, belongs: np.ndarray) -> jax.Array:
    """Between sums, one per register or head, and a matrix of zeros and ones; in float32 without loss."""
    return jnp.einsum(subscripts, x, jnp.asarray(belongs, x.dtype), precision=jax.lax.Precision.HIGHEST)


def _view(shape: tuple[int, ...], heads: int, shared: bool) -> _LastAxis | _Tiles:
    """Of ``[B, T, H * K]``: by tiles on a TPU, if each device has whole ones. ``shared``: heads may share registers."""
    _, length, every = shape
    channels, devices = every // heads, sharding.parts("heads")
    in_tiles = length % (sharding.parts("time") * SUBLANES) == 0 and every % (devices * LANES) == 0
    fits = channels >= _FEWEST if shared else channels % LANES == 0
    if backends.platform() != "tpu" or 0 in shape or not in_tiles or heads % devices or not fits:
        return _LastAxis(heads)
    return _Tiles(channels, every // devices, devices)
