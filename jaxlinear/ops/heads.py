"""Norms over heads, and factors of heads, on arrays ``[B, T, H * K]``.

On a TPU the last two axes of an array lie in memory in tiles of 8 x 128: there a tile is 8 tokens of 128 channels, but in
``[B, T, H, K]`` 8 heads of one token. XLA copies an array, most often in float32, from one to the other before a sum over
K, and back after it; the gradient of a factor is such a sum, too. So sums are taken there over axes that are the tiles
themselves.

``shards``: into how many parts a mesh divides T and H * K; (1, 1) on one device.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.ops import backends, dtypes
from jaxlinear.pallas.parts.lanes import LANES, SUBLANES

Shards = tuple[int, int]

UNIT_EPSILON = 1e-6  # added to the squared length of a query or a key
_FEWEST = 32  # channels of a head: with more heads in a register, their sums would take longer than the copies


def normalise(
    x: jax.Array,
    heads: int,
    epsilon: float,
    *,
    centred: bool = False,
    weights: jax.Array | None = None,
    shards: Shards = (1, 1),
) -> jax.Array:
    """``x / sqrt(mean(x^2) + epsilon)`` over each head of ``[B, T, H * K]``, in float32 or wider.

    ``centred``: with each head's mean subtracted from x first. ``weights``: ``[K]``, factors.
    """
    x = _placed(x, heads, shards, shared=weights is None)
    return _normalised(x, heads, epsilon, shards, centred=centred, weights=weights)


def unit_length(x: jax.Array, heads: int, *, shards: Shards = (1, 1)) -> jax.Array:
    """``x / |x|`` over each head of ``[B, T, H * K]``, in float32 internally; zeros stay zeros."""
    # |x| is the root of the sum of squares, not of their mean.
    return _placed(_normalised(x, heads, UNIT_EPSILON, shards, count=1).astype(x.dtype), heads, shards)


def scale_heads(x: jax.Array, scales: jax.Array, *, shards: Shards = (1, 1)) -> jax.Array:
    """Each head of ``[B, T, H * K]`` times its own number ``[B, T, H]``, in the dtype of ``scales`` internally."""
    heads = scales.shape[-1]
    view = _view(x.shape, heads, True, shards)
    y = view.split(x.astype(scales.dtype)) * view.broadcast(view.by_heads(scales))
    return _placed(view.joined(y).reshape(x.shape).astype(x.dtype), heads, shards)


def _placed(x: jax.Array, heads: int, shards: Shards, *, shared: bool = True) -> jax.Array:
    """x, as ``[B, T, H * K]`` in memory if sums are over tiles. XLA could compute it as the ``[B, T, H, K]`` that a mesh
    places before or after it, and would then copy it."""
    return jax.lax.optimization_barrier(x) if isinstance(_view(x.shape, heads, shared, shards), _Tiles) else x


def _normalised(
    x: jax.Array,
    heads: int,
    epsilon: float,
    shards: Shards,
    *,
    count: int = 0,
    centred: bool = False,
    weights: jax.Array | None = None,
) -> jax.Array:
    """``x / sqrt(sum / count + epsilon)`` with the sum of the squares of each head of ``[B, T, H * K]``, by default their
    mean, in float32 or wider; ``centred``: with each head's mean subtracted from x. ``weights``: ``[K]``, factors."""
    channels, view = x.shape[-1] // heads, _view(x.shape, heads, weights is None, shards)
    y = view.split(x.astype(dtypes.wide(x.dtype)))
    if centred:
        y = y - view.broadcast(view.sums(y) / channels)
    y = y * view.broadcast(jax.lax.rsqrt(view.sums(y * y) / (count or channels) + epsilon))
    if weights is not None:
        y = view.weighted(y, weights.astype(y.dtype))
    return view.joined(y).reshape(x.shape)


class _LastAxis:
    """Sums over the last axis of ``[B, T, H, K]``."""

    def __init__(self, heads: int):
        self.heads = heads

    def split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def joined(self, y: jax.Array) -> jax.Array:
        return y

    broadcast = joined

    def by_heads(self, y: jax.Array) -> jax.Array:
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

    def by_heads(self, y: jax.Array) -> jax.Array:
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

    def broadcast(self, of_heads: jax.Array) -> jax.Array:
        """At each channel, the value of its head."""
        if self.alone:
            return of_heads[..., None]
        broadcast, *others = (_product("btdhs,rh->btdrs", of_heads, belongs)[..., None] for belongs in self.belongs)
        for mask, values in zip(self.masks[1:], others, strict=True):
            broadcast = jnp.where(mask, values, broadcast)
        return broadcast

    def weighted(self, y: jax.Array, weights: jax.Array) -> jax.Array:
        # Not repeated for each head: devices would sum the gradients of all repetitions.
        registers = self.channels // LANES
        of_heads = y.reshape(*y.shape[:3], -1, registers, *y.shape[4:])
        return (of_heads * weights.reshape(1, 1, 1, 1, registers, 1, LANES)).reshape(y.shape)


def _product(subscripts: str, x: jax.Array, belongs: np.ndarray) -> jax.Array:
    """Between sums, one per register or head, and a matrix of zeros and ones; in float32 without loss."""
    return jnp.einsum(subscripts, x, jnp.asarray(belongs, x.dtype), precision=jax.lax.Precision.HIGHEST)


def _view(shape: tuple[int, ...], heads: int, shared: bool, shards: Shards) -> _LastAxis | _Tiles:
    """Of ``[B, T, H * K]``: by tiles on a TPU, if each device has whole ones. ``shared``: heads may share registers."""
    _, length, every = shape
    of_time, devices = shards
    channels = every // heads
    in_tiles = length % (of_time * SUBLANES) == 0 and every % (devices * LANES) == 0
    fits = channels >= _FEWEST if shared else channels % LANES == 0
    if backends.platform() != "tpu" or 0 in shape or not in_tiles or heads % devices or not fits:
        return _LastAxis(heads)
    return _Tiles(channels, every // devices, devices)
