"""Document boundaries of packed sequences, in the forms that the operations use."""

import jax
import jax.numpy as jnp
from jax import lax


def starts(segment_ids: jax.Array) -> jax.Array:
    """Where a document begins inside the row: ``[B, T]`` bool, true where the id differs from the one before.

    Position 0 is false: the initial state decides whether the first token continues an earlier run.
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.concatenate([jnp.zeros_like(changed, shape=(segment_ids.shape[0], 1)), changed], axis=1)


def ends(segment_ids: jax.Array) -> jax.Array:
    """Where a document ends inside the row: ``[B, T]`` bool, true where the id differs from the one after."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.concatenate([changed, jnp.zeros_like(changed, shape=(segment_ids.shape[0], 1))], axis=1)


def runs(segment_ids: jax.Array) -> jax.Array:
    """``[B, T]`` int32: runs of equal ids, numbered from 0, so that an id used twice in a row names two documents."""
    return jnp.cumsum(starts(segment_ids), axis=1, dtype=jnp.int32)


def first_positions(segment_ids: jax.Array) -> jax.Array:
    """``[B, T]`` int32: where in the row the document of each token begins."""
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    return lax.cummax(jnp.where(starts(segment_ids), positions, 0), axis=1)
