"""Softmax attention of one token to the keys and values of the last ones, which lie in slots: position p in slot
``p % slots``."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import backends, dtypes

_ROWS = 8  # rows that make a product run on a TPU's matrix unit


def attend_to_slots(
    q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array, seen: jax.Array
) -> jax.Array:
    """``[B, 1, H, V]`` of a token that sees itself and the ``seen`` tokens before it.

    Args:
      q: ``[B, 1, H, K]``.
      keys, values: ``[B, G, slots, K]`` and ``[B, G, slots, V]``, with the token's own; G divides H.
      position, seen: ``[B]`` int32.
    """
    batch, _, heads, width = q.shape
    groups, slots = keys.shape[1:3]
    age = (position[:, None] - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    q = q.reshape(batch, groups, -1, width) * width**-0.5
    sharing = q.shape[2]
    if sharing == 1 and backends.platform() == "tpu":
        # There, products with a single row run element by element, which takes longer than reading the slots.
        q = jnp.pad(q, ((0, 0), (0, 0), (0, _ROWS - 1), (0, 0)))
    logits = dtypes.product("bgrk,bgsk->bgrs", q, keys)
    weights = jax.nn.softmax(jnp.where((age <= seen[:, None])[:, None, None], logits, -jnp.inf), axis=-1)
    o = dtypes.product("bgrs,bgsk->bgrk", weights.astype(values.dtype), values)[:, :, :sharing]
    return o.reshape(batch, 1, heads, -1).astype(values.dtype)


def write_slots(
    past: tuple[jax.Array, ...], new: tuple[jax.Array, ...], slot: jax.Array, *, on_one_device: bool
) -> tuple[jax.Array, ...]:
    """Each ``[B, G, slots, K]`` of the past, with the new ``[B, 1, G, K]`` written at ``slot`` ``[B]``."""
    new = tuple(x.swapaxes(1, 2) for x in new)
    write = functools.partial(lax.dynamic_update_slice_in_dim, axis=1)

    def row_by_row(past):
        return tuple(jax.vmap(write)(x, token, slot) for x, token in zip(past, new, strict=True))

    if backends.platform() != "tpu" or not on_one_device:
        return row_by_row(past)

    def at_once(past):
        return tuple(
            lax.dynamic_update_slice_in_dim(x, token, slot[0], axis=2) for x, token in zip(past, new, strict=True)
        )

    # Row by row, it is a loop over the rows there. Rows that began together, like those of ``generate``, share one slot.
    return lax.cond(jnp.all(slot == slot[:1]), at_once, row_by_row, past)
