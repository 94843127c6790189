"""The maps S -> M S + C of the delta rule: what ``DeltaRule`` and ``DeltaRuleKernel`` share."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.ops import dtypes, recurrence


class Inputs(NamedTuple):
    """The inputs of a run, arrays ``[B, T, ...]``. If a token makes J updates, k, v and beta have an axis J after H."""

    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, T, H, K] or [B, T, H, J, K]
    v: jax.Array  # [B, T, H, V] or [B, T, H, J, V]
    beta: jax.Array  # [B, T, H] or [B, T, H, J]
    log_decay: jax.Array | None  # [B, T, H] or [B, T, H, K]
    starts: jax.Array | None  # [B, T] bool, true where a document, and with it the state, begins

    @property
    def updates(self) -> int:
        """J."""
        return self.beta.shape[3] if self.beta.ndim == 4 else 1

    def by_update(self) -> "Inputs":
        """The same inputs as T J tokens of one update each: what a token does before its updates happens at the first
        of them, and it is read at the last."""
        updates = self.updates
        if self.beta.ndim == 3:
            return self

        def each(x: jax.Array) -> jax.Array:
            x = jnp.moveaxis(x, 3, 2)
            return x.reshape(x.shape[0], x.shape[1] * updates, *x.shape[3:])

        def one(x: jax.Array, place: int) -> jax.Array:
            around = ((0, 0), (0, 0), (place, updates - 1 - place), *((0, 0),) * (x.ndim - 2))
            return jnp.pad(x[:, :, None], around).reshape(x.shape[0], x.shape[1] * updates, *x.shape[2:])

        k, v, beta = each(self.k), each(self.v), each(self.beta)
        log_decay, starts = (None if x is None else one(x, 0) for x in (self.log_decay, self.starts))
        return Inputs(one(self.q, updates - 1), k, v, beta, log_decay, starts)


@dataclasses.dataclass(frozen=True)
class DeltaRuleMaps(recurrence.Family):
    """The part of the family that concerns maps: a summary is ``(M [B, H, K, K], C [B, H, K, V])``."""

    def compose(self, earlier, later) -> tuple[jax.Array, jax.Array]:
        transition = dtypes.product("...kl,...lm->...km", later[0], earlier[0])
        return transition, self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        return dtypes.product("...kl,...lv->...kv", summary[0], state) + summary[1]
