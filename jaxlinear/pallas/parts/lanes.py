"""Where a head's channels are in the registers of a TPU, which have 128 lanes.

Heads with fewer channels share registers. Moving those of each to the first lanes takes up to as long as the arithmetic of
a kernel: they stay where they are, and the channels of other heads in their register are set to zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128  # channels of a register
SUBLANES = 8  # its rows


class Lanes(NamedTuple):
    """A head's part of an array ``[..., heads * channels]``, loaded and stored as a whole register."""

    register: slice  # of the array's channels
    first: int  # channel of the head among those of the register
    channels: int

    @property
    def left(self) -> int:
        """Channels of the register after the head's."""
        return self.register.stop - self.register.start - self.first - self.channels

    def only(self, x: jax.Array, others: jax.Array | None = None) -> jax.Array:
        """The head's channels of a register, with those of ``others`` or zero for the other heads'."""
        if not self.first and not self.left:
            return x
        lane = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) - self.first
        return jnp.where((lane >= 0) & (lane < self.channels), x, jnp.zeros_like(x) if others is None else others)

    def broadcast(self, x: jax.Array, axis: int) -> jax.Array:
        """Puts the head's channels, alone along ``axis`` of x, into a register of zeros."""
        shape = lambda count: (*x.shape[:axis], count, *x.shape[axis + 1 :])  # noqa: E731
        before, after = (jnp.zeros(shape(count), x.dtype) for count in (self.first, self.left))
        return jnp.concatenate([part for part in (before, x, after) if part.shape[axis]], axis)

    def taken(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of ``broadcast``."""
        return lax.slice_in_dim(x, self.first, self.first + self.channels, axis=axis)


def head_lanes(head: int, channels: int, heads: int) -> Lanes:
    """``heads``: of the array. Unless one register holds all, those that may be in two, or leave one partly empty, are
    moved and have registers of their own. All heads have equally many lanes."""
    start, every = head * channels, heads * channels
    if LANES % channels or (every > LANES and every % LANES):
        return Lanes(slice(start, start + channels), 0, channels)
    register = start // LANES * LANES
    return Lanes(slice(register, min(register + LANES, every)), start - register, channels)


def broadcast(state: jax.Array, values: Lanes, keys: Lanes) -> jax.Array:
    """A head's state ``[V, K]`` for products with whole registers of values and keys."""
    return keys.broadcast(values.broadcast(state, 0), 1)


def taken(state: jax.Array, values: Lanes, keys: Lanes) -> jax.Array:
    """The inverse of ``broadcast``."""
    return keys.taken(values.taken(state, 0), 1)


def fill(ref, row) -> None:
    """Each token's number of ``row`` ``[1, c]``, c a multiple of 128, on all lanes of ``ref`` ``[c, 128]``."""
    for i in range(0, ref.shape[0], LANES):
        ref[i : i + LANES] = jnp.broadcast_to(row[:, i : i + LANES], (LANES, LANES)).T
