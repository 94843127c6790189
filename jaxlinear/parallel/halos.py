"""What a shard of time sees of the shards before it: a fixed number of positions. Everything here runs within
``shard_map``.

These positions are kept for the backward pass, whatever is recomputed (``checkpoint_name``), so that nothing crosses
the network twice.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear.parallel.exchanges import AXIS, EXCHANGED


def before(x: jax.Array, width: int, first: jax.Array) -> jax.Array:
    """The ``width`` positions before this shard's own: ``[B, T, ...]`` -> ``[B, width, ...]``.

    ``first`` ``[B, width, ...]`` holds those before the whole sequence. There are as many hops as the width needs.
    """
    if width == 0:
        return x[:, :0]
    start = lax.axis_index(AXIS) * x.shape[1]
    past = _hops(x, width)
    place = jnp.arange(width, dtype=jnp.int32) + start  # index into ``first``, valid below its width
    outside = jnp.take(first, jnp.minimum(place, width - 1), axis=1).astype(x.dtype)
    return jnp.where(jnp.expand_dims(place < width, (0, *range(2, x.ndim))), outside, past)


def ids_before(ids: jax.Array, width: int) -> jax.Array:
    """As ``before``, for segment ids ``[B, T]``; the positions before the whole sequence have the first token's id."""
    if width == 0:
        return ids[:, :0]
    past = jnp.concatenate([_hops(ids, width), ids[:, :1]], axis=1)
    own = jnp.arange(width, dtype=jnp.int32)
    begin = width - lax.axis_index(AXIS) * ids.shape[1]  # where in ``past`` the sequence begins
    return jnp.take(past, jnp.clip(begin, own, width), axis=1)


def _hops(x: jax.Array, width: int) -> jax.Array:
    """``[B, width, ...]`` from the shards before; zeros where there is none."""
    length, shards = x.shape[1], lax.axis_size(AXIS)
    parts = []
    for hop in range(math.ceil(width / length), 0, -1):
        part = x[:, -min(length, width - (hop - 1) * length) :]
        pairs = [(i, i + hop) for i in range(shards - hop)]
        parts.append(lax.ppermute(part, AXIS, pairs) if pairs else jnp.zeros_like(part))
    return checkpoint_name(jnp.concatenate(parts, axis=1), EXCHANGED)
