"""The maps S -> M S + C of the delta rule: what ``DeltaRule`` and ``DeltaRuleKernel`` share."""

import dataclasses
from typing import NamedTuple

import jax

from jaxlinear.ops import dtypes, recurrence


class Inputs(NamedTuple):
    """What a run is made of. Arrays ``[B, T, ...]``."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    log_decay: jax.Array | None  # [B, T, H] or [B, T, H, K]
    starts: jax.Array | None  # [B, T] bool, true where a document begins and the state with it


@dataclasses.dataclass(frozen=True)
class DeltaRuleMaps(recurrence.Family):
    """The part of the family that is about maps: a summary is ``(M [B, H, K, K], C [B, H, K, V])``."""

    def compose(self, earlier, later) -> tuple[jax.Array, jax.Array]:
        transition = dtypes.product("...kl,...lm->...km", later[0], earlier[0])
        return transition, self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        return dtypes.product("...kl,...lv->...kv", summary[0], state) + summary[1]
