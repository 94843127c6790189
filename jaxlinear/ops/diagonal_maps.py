"""The maps S -> M S + C of diagonal recurrences, M elementwise: what ``Diagonal`` and ``DiagonalKernel`` share."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import recurrence


class Power(NamedTuple):
    """M of a transition that is constant in time: a^n for a run of n tokens, but zero if a document ends in the run."""

    kept: jax.Array  # [B], 1 where it is a^n, else 0
    power: jax.Array  # [B or 1, ...]


Transition = jax.Array | Power


@dataclasses.dataclass(frozen=True)
class DiagonalMaps(recurrence.Family):
    """The part of the family that concerns maps."""

    def compose(self, earlier, later) -> tuple[Transition, jax.Array]:
        return jax.tree.map(jnp.multiply, later[0], earlier[0]), self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        transition, added = summary
        if isinstance(transition, Power):
            transition = _of_power(transition)
        return transition * state + added

    def pack(self, transition: Transition) -> jax.Array:
        return transition.kept if isinstance(transition, Power) else transition

    def unpack(self, packed: jax.Array, constants: jax.Array | None, length: int) -> Transition:
        if constants is None:
            return packed
        return Power(packed, lax.integer_pow(constants.astype(packed.dtype), length)[None])


def _of_power(transition: Power) -> jax.Array:
    kept = jnp.expand_dims(transition.kept.astype(bool), tuple(range(1, transition.power.ndim)))
    return jnp.where(kept, transition.power, jnp.zeros((), transition.power.dtype))
