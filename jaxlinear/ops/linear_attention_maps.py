"""The maps S -> diag(kept) S + C of linear attention: what ``LinearAttention`` and ``LinearAttentionKernel`` share."""

import dataclasses
from typing import NamedTuple

import jax

from jaxlinear.ops import recurrence


class Inputs(NamedTuple):
    """The inputs of a run, arrays ``[B, T, ...]``."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None  # [B, T, H] or [B, T, H, K]
    starts: jax.Array | None  # [B, T] bool, true where a document, and with it the state, begins
    present: jax.Array | None  # [B, T] bool, given with a constant decay: false for padding, which must not decay


@dataclasses.dataclass(frozen=True)
class LinearAttentionMaps(recurrence.Family):
    """The part of the family that concerns maps. M is diagonal: a summary is ``(kept [B, H, K or 1], C [B, H, K, V])``."""

    def compose(self, earlier, later) -> tuple[jax.Array, jax.Array]:
        return later[0] * earlier[0], self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        return summary[0][..., None] * state + summary[1]
