"""The exchange of maps between shards of time, in two forms behind one interface.

``all_gather``: one collective; every shard holds the W maps and folds them itself. ``doubling``: log2 W permutes of
composed maps and one more; two maps in memory. ``parallel.cost`` estimates the cost of each.

A forward exchange takes a shard's own map (M_r, C_r) and the state before the first shard. It returns the state before
this shard, the state after the last, and those of the M that its backward exchange needs, packed, ``[W or 1, B, ...]``.
A backward exchange takes these, D_r and the gradient of the last state, and returns G_r and the gradient of the first
state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxlinear.ops import protocol
from jaxlinear.ops.protocol import Constants, Family, State, Summary

AXIS = "sequence"
EXCHANGED = "exchanged"  # values with this name are kept for the backward pass, under any remat policy
LANES = 128  # exchanged vectors are padded to a multiple of this


class Maps(NamedTuple):
    """The maps of shards of ``length`` tokens each. Their M travel as the family packs them."""

    family: Family
    constants: Constants
    length: int

    def pack(self, transition: Any) -> Any:
        return self.family.pack(transition)

    def unpack(self, packed: Any, shards: int = 1) -> Any:
        """The M of ``shards`` shards together."""
        return self.family.unpack(packed, self.constants, shards * self.length)

    def back(self, transition: Any, d_shard: State, d_state: State) -> State:
        """D + M^T d_state."""
        return jax.tree.map(jnp.add, d_shard, protocol.transposed(self.family, transition, d_state))


def gather(maps: Maps, summary: Summary, state: State) -> tuple[State, State, Any]:
    """The forward exchange by one all-gather."""
    transitions, states = _all_gather((maps.pack(summary[0]), summary[1]))
    rank = lax.axis_index(AXIS)

    def step(r, carry):
        state, start = carry
        start = _where(r == rank, state, start)
        return maps.family.advance((maps.unpack(_take(transitions, r)), _take(states, r)), state), start

    final, start = lax.fori_loop(0, lax.axis_size(AXIS), step, (state, state))
    return start, final, transitions


def gather_back(maps: Maps, transitions: Any, d_shard: State, d_final: State) -> tuple[State, State]:
    """The backward exchange by one all-gather."""
    gathered, rank, last = _all_gather(d_shard), lax.axis_index(AXIS), lax.axis_size(AXIS) - 1

    def step(i, carry):
        r = last - i
        d_state, d_after = carry
        d_after = _where(r == rank, d_state, d_after)
        return maps.back(maps.unpack(_take(transitions, r)), _take(gathered, r), d_state), d_after

    d_state, d_after = lax.fori_loop(0, last + 1, step, (d_final, d_final))
    return d_after, d_state


def double(maps: Maps, summary: Summary, state: State) -> tuple[State, State, Any]:
    """The forward exchange by doubling: after step i, a shard holds the map of itself and the 2^i - 1 before it.

    The state before the sequence is part of the first shard's C, whose M is therefore zero. So any M that is not zero
    covers 2^i shards, wherever it is.
    """
    rank, shards = lax.axis_index(AXIS), lax.axis_size(AXIS)
    first = jax.tree.map(jnp.zeros_like, summary[0]), maps.family.advance(summary, state)
    (transition, total), distance = _where(rank == 0, first, summary), 1
    while distance < shards:
        packed, earlier = _permute((maps.pack(transition), total), distance)
        both = maps.family.compose((maps.unpack(packed, distance), earlier), (transition, total))
        transition, total = _where(rank >= distance, both, (transition, total))
        distance *= 2
    start = _where(rank == 0, state, _permute(total, 1))
    return start, _from(shards - 1, total), jax.tree.map(lambda x: x[None], maps.pack(summary[0]))


def double_back(maps: Maps, transitions: Any, d_shard: State, d_final: State) -> tuple[State, State]:
    """The backward exchange by doubling: after step i, a shard holds D and M of itself and the 2^i - 1 after it.

    The gradient of the last state is part of the last shard's D, whose M is therefore zero.
    """
    rank, shards = lax.axis_index(AXIS), lax.axis_size(AXIS)
    own = maps.unpack(_take(transitions, 0))
    last = jax.tree.map(jnp.zeros_like, own), maps.back(own, d_shard, d_final)
    (transition, d_total), distance = _where(rank == shards - 1, last, (own, d_shard)), 1
    none = jax.tree.map(jnp.zeros_like, d_shard)
    while distance < shards:
        packed, d_later = _permute((maps.pack(transition), d_total), -distance)
        later = maps.unpack(packed, distance), none
        both = maps.family.compose((transition, none), later)[0], maps.back(transition, d_total, d_later)
        transition, d_total = _where(rank < shards - distance, both, (transition, d_total))
        distance *= 2
    d_after = _where(rank == shards - 1, d_final, _permute(d_total, -1))
    return d_after, _from(0, d_total)


EXCHANGES = {"all_gather": (gather, gather_back), "doubling": (double, double_back)}


def _all_gather(tree):
    """``[W, ...]`` of each leaf, by one collective for all of them."""
    flat, unravel = _flat(tree)
    return jax.vmap(unravel)(lax.all_gather(flat, AXIS))


def _permute(tree, distance: int):
    """The tree of the shard ``distance`` places before; zeros where there is none."""
    flat, unravel = _flat(tree)
    shards = lax.axis_size(AXIS)
    pairs = [(i, i + distance) for i in range(shards) if 0 <= i + distance < shards]
    return unravel(lax.ppermute(flat, AXIS, pairs))


def _flat(tree):
    """All leaves as one real vector, and the function that restores them. It is real because XLA exchanges the parts of
    complex numbers one by one on TPU, and fills whole rows of its registers because XLA turns other all-gathers into
    all-reduces of W times the size."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [(jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,) for x in leaves]
    flat, unravel = ravel_pytree(parts)
    size = flat.size

    def back(flat):
        return structure.unflatten([part[0] if len(part) == 1 else lax.complex(*part) for part in unravel(flat[:size])])

    return jnp.pad(flat, (0, -size % LANES)), back


def _from(rank: int, tree):
    """The tree of shard ``rank``, on every shard."""
    mine = lax.axis_index(AXIS) == rank
    return jax.tree.map(lambda x: lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), AXIS), tree)


def _take(tree, r):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, r, axis=0, keepdims=False), tree)


def _where(condition, these, those):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), these, those)
