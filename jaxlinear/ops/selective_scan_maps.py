"""The maps S -> M S + C of selective scans, M elementwise: what ``SelectiveScan`` and ``SelectiveScanKernel`` share."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.ops import dtypes, recurrence


class Inputs(NamedTuple):
    """The inputs of a run. Zeros are tokens that change nothing. B and C have an axis for channels, of length 1 because all
    channels share them (``parallel.sequence``)."""

    x: jax.Array  # [B, T, D]
    dt: jax.Array  # [B, T, D]
    B: jax.Array  # [B, T, 1, N]
    C: jax.Array  # [B, T, 1, N]
    starts: jax.Array | None  # [B, T] bool, true where a document, and with it the state, begins


@dataclasses.dataclass(frozen=True)
class SelectiveScanMaps(recurrence.Family):
    """The part of the family that concerns maps: a summary is ``(M, C)``, each ``[B, D, N]``."""

    def compose(self, earlier, later) -> tuple[jax.Array, jax.Array]:
        return later[0] * earlier[0], self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        return summary[0] * state + summary[1]


def no_state(x: jax.Array, dt: jax.Array, A: jax.Array | None, B: jax.Array, C: jax.Array) -> jax.Array:
    """Zeros ``[B, D, N]`` in the dtype of states, which is that of the whole computation."""
    wide = dtypes.wide(*(y.dtype for y in (x, dt, A, B, C) if y is not None))
    return jnp.zeros_like(x, shape=(x.shape[0], x.shape[2], B.shape[-1]), dtype=wide)


def kept(inputs: Inputs, A: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """M ``[B, D, N]`` of a run whose transitions are ``exp(dt_t A)``: that of the sum of the time steps."""
    dt = jnp.sum(inputs.dt.astype(dtype), axis=1)
    decay = jnp.exp(dt[..., None] * A.astype(dtype)[None])
    if inputs.starts is None:
        return decay
    return jnp.where(jnp.any(inputs.starts, axis=1)[:, None, None], jnp.zeros((), dtype), decay)
