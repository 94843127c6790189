"""The exchange of maps between shards of time, in two forms behind one interface.

``all_gather``: one collective; every shard holds the W maps and folds them itself. ``doubling``: log2 W permutes of
composed maps and one more; two maps in memory.

A forward exchange takes a shard's own map (M_r, C_r) and the state before the first shard, and gives the state before
the own shard, the state after the last, and what of the M its backward exchange needs ``[W or 1, B, ...]``. A backward
exchange takes that, D_r and the gradient of the last state, and gives G_r and the gradient of the first state.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxlinear.ops import recurrence
from jaxlinear.ops.recurrence import Family, State, Summary

AXIS = "sequence"


def gather(family: Family, summary: Summary, state: State) -> tuple[State, State, Summary]:
    """Forward, by one all-gather."""
    gathered, rank = _all_gather(summary), lax.axis_index(AXIS)

    def step(r, carry):
        state, start = carry
        start = _where(r == rank, state, start)
        return family.advance(_take(gathered, r), state), start

    final, start = lax.fori_loop(0, lax.axis_size(AXIS), step, (state, state))
    return start, final, gathered[0]


def gather_back(family: Family, transitions: Summary, d_shard: State, d_final: State) -> tuple[State, State]:
    """Backward, by one all-gather."""
    gathered, rank, last = _all_gather(d_shard), lax.axis_index(AXIS), lax.axis_size(AXIS) - 1

    def step(i, carry):
        r = last - i
        d_state, d_after = carry
        d_after = _where(r == rank, d_state, d_after)
        through = recurrence.transposed(family, _take(transitions, r), d_state)
        return jax.tree.map(jnp.add, _take(gathered, r), through), d_after

    d_state, d_after = lax.fori_loop(0, last + 1, step, (d_final, d_final))
    return d_after, d_state


def double(family: Family, summary: Summary, state: State) -> tuple[State, State, Summary]:
    """Forward, by doubling: after step i, a shard holds the map of itself and the 2^i - 1 before it."""
    rank, shards = lax.axis_index(AXIS), lax.axis_size(AXIS)
    total, distance = summary, 1
    while distance < shards:
        earlier = _permute(total, distance)
        total = _where(rank >= distance, family.compose(earlier, total), total)
        distance *= 2
    start = _where(rank == 0, state, family.advance(_permute(total, 1), state))
    final = _from(shards - 1, family.advance(total, state))
    return start, final, jax.tree.map(lambda x: x[None], summary[0])


def double_back(family: Family, transitions: Summary, d_shard: State, d_final: State) -> tuple[State, State]:
    """Backward, by doubling: after step i, a shard holds D and M of itself and the 2^i - 1 behind it."""
    rank, shards = lax.axis_index(AXIS), lax.axis_size(AXIS)
    transition, d_total, distance = jax.tree.map(lambda x: x[0], transitions), d_shard, 1
    none = jax.tree.map(jnp.zeros_like, d_shard)

    def through(transition, d_total, d_state):
        return jax.tree.map(jnp.add, d_total, recurrence.transposed(family, transition, d_state))

    while distance < shards:
        later, d_later = _permute((transition, d_total), -distance)
        both = family.compose((transition, none), (later, none))[0], through(transition, d_total, d_later)
        transition, d_total = _where(rank < shards - distance, both, (transition, d_total))
        distance *= 2
    d_after = _where(rank == shards - 1, d_final, through(*_permute((transition, d_total), -1), d_final))
    return d_after, _from(0, through(transition, d_total, d_final))


EXCHANGES = {"all_gather": (gather, gather_back), "doubling": (double, double_back)}


def _all_gather(tree):
    """``[W, ...]`` of each leaf, by one collective for all of them."""
    flat, unravel = ravel_pytree(tree)
    return jax.vmap(unravel)(lax.all_gather(flat, AXIS))


def _permute(tree, distance: int):
    """What the shard ``distance`` places before holds; zeros where there is none."""
    flat, unravel = ravel_pytree(tree)
    shards = lax.axis_size(AXIS)
    pairs = [(i, i + distance) for i in range(shards) if 0 <= i + distance < shards]
    return unravel(lax.ppermute(flat, AXIS, pairs))


def _from(rank: int, tree):
    """What the shard ``rank`` holds, on every shard."""
    mine = lax.axis_index(AXIS) == rank
    return jax.tree.map(lambda x: lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), AXIS), tree)


def _take(tree, r):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, r, axis=0, keepdims=False), tree)


def _where(condition, these, those):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), these, those)
