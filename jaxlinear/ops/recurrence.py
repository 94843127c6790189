"""What every family of recurrence is: a run of tokens, however long, does to the state one affine map, S -> M S + C.

A family says how a run is summarised as (M, C), how a state is advanced by such a summary, and how the run's outputs
follow from the state before it. All that splits time is written against these, once for every family: chunks here,
devices in ``jaxlinear.parallel``.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Inputs = Any  # a tree of arrays [B, T, ...]
Constants = Any  # a tree of arrays that do not change with time and have no B
Run = Any  # what a family keeps of a run
Summary = Any  # (M, C)
State = Any  # [B, ...]


class Family(Protocol):
    """One kind of transition. Hashable, so that it can be a static argument; all arrays are in its arguments.

    Zeros in ``inputs`` are tokens that change nothing: a run is padded with them.
    """

    def prepare(self, inputs: Inputs, constants: Constants) -> Run:
        """All of a run that does not depend on the state before it: what ``summarise`` and ``apply`` share."""

    def summarise(self, run: Run) -> Summary:
        """The run's map (M, C), float32, its size independent of T. M is zero where a document ends in the run."""

    def compose(self, earlier: Summary, later: Summary) -> Summary:
        """The map of two runs, one after the other: (M2 M1, M2 C1 + C2)."""

    def advance(self, summary: Summary, state: State) -> State:
        """M S + C: the state after the run."""

    def apply(self, run: Run, state: State) -> jax.Array:
        """The run's outputs ``[B, T, ...]``, given the state before it."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(family: Family, chunk: int, inputs: Inputs, constants: Constants, state: State) -> tuple[jax.Array, State]:
    """Runs a family in chunks of time: every chunk at once, but for the fold of their maps over the state.

    Kept for the backward pass are the inputs and the state before each chunk; the rest is computed again. Backward,
    with D_n the gradient of chunk n's outputs with respect to the state before it, the gradient of the state after
    chunk n is G_n = D_{n+1} + M_{n+1}^T G_{n+1}, and a chunk's own gradients follow from its outputs' and G_n.

    Args:
      family: which.
      chunk: tokens in a chunk; T need not be a multiple of it.
      inputs: tree of ``[B, T, ...]``.
      constants: tree of arrays without time.
      state: before the first token, ``[B, ...]``.

    Returns:
      the outputs ``[B, T, ...]`` and the state after the last token.
    """
    return _forward(family, chunk, inputs, constants, state)[0]


def _forward(family, chunk, inputs, constants, state):
    batch, length = jax.tree.leaves(inputs)[0].shape[:2]
    run = family.prepare(_split(inputs, chunk), constants)
    summaries = _by_chunk(family.summarise(run), batch)
    before, final = _fold(family, summaries, state)
    outputs = _join(family.apply(run, _flat(before)), batch, length)
    outputs, before = checkpoint_name((outputs, before), "recurrence")
    return (outputs, final), (inputs, constants, before)


def _backward(family, chunk, residuals, cotangents):
    inputs, constants, before = residuals
    d_outputs, d_final = cotangents
    batch = d_outputs.shape[0]

    def local(inputs, constants, before):
        run = family.prepare(inputs, constants)
        return family.apply(run, before), family.summarise(run)

    chunks, states = _split(inputs, chunk), _flat(before)
    (_, summaries), pullback = jax.vjp(local, chunks, constants, states)
    d_outputs = _split(d_outputs, chunk)
    zeros = jax.tree.map(jnp.zeros_like, summaries)
    through_outputs = _by_chunk(pullback((d_outputs, zeros))[2], batch)  # D
    after, d_state = _fold_back(family, _by_chunk(summaries, batch), through_outputs, d_final)  # G
    _, of_advance = jax.vjp(lambda summary: family.advance(summary, states), summaries)
    d_inputs, d_constants, _ = pullback((d_outputs, of_advance(_flat(after))[0]))
    length = jax.tree.leaves(inputs)[0].shape[1]
    return jax.tree.map(lambda x: _join(x, batch, length), d_inputs), d_constants, d_state


chunked.defvjp(_forward, _backward)


def _fold(family: Family, summaries: Summary, state: State) -> tuple[State, State]:
    """The states before each chunk ``[B, N, ...]`` and after the last, from the chunks' maps ``[B, N, ...]``."""

    def step(n, carry):
        state, before = carry
        before = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, n, axis=1), before, state)
        return family.advance(_at(summaries, n), state), before

    count = _count(summaries)
    before = jax.tree.map(lambda x: jnp.zeros_like(x, shape=(x.shape[0], count, *x.shape[1:])), state)
    final, before = lax.fori_loop(0, count, step, (state, before))
    return before, final


def _fold_back(family: Family, summaries: Summary, through_outputs: State, d_final: State) -> tuple[State, State]:
    """The gradients of the states after each chunk ``[B, N, ...]``, and of the state before the first."""
    count = _count(summaries)

    def step(i, carry):
        n = count - 1 - i
        d_state, after = carry
        after = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, n, axis=1), after, d_state)
        transposed = jax.linear_transpose(lambda state: _linear_part(family, _at(summaries, n), state), d_state)
        return jax.tree.map(jnp.add, _at(through_outputs, n), transposed(d_state)[0]), after

    after = jax.tree.map(jnp.zeros_like, through_outputs)
    d_state, after = lax.fori_loop(0, count, step, (d_final, after))
    return after, d_state


def _linear_part(family: Family, summary: Summary, state: State) -> State:
    transition, addition = summary
    return family.advance((transition, jax.tree.map(jnp.zeros_like, addition)), state)


def _count(summaries: Summary) -> int:
    return jax.tree.leaves(summaries)[0].shape[1]


def _at(tree, n):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, n, axis=1, keepdims=False), tree)


def _split(tree, chunk: int):
    """``[B, T, ...]`` -> ``[B * N, chunk, ...]``, padded with zeros at the end."""

    def one(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(-1, chunk, *x.shape[2:])

    return jax.tree.map(one, tree)


def _join(x: jax.Array, batch: int, length: int) -> jax.Array | None:
    """The inverse of ``_split``; None for the gradient of what has none (bools)."""
    return None if x.dtype == jax.dtypes.float0 else x.reshape(batch, -1, *x.shape[2:])[:, :length]


def _by_chunk(tree, batch: int):
    """``[B * N, ...]`` -> ``[B, N, ...]``."""
    return jax.tree.map(lambda x: x.reshape(batch, -1, *x.shape[1:]), tree)


def _flat(tree):
    """``[B, N, ...]`` -> ``[B * N, ...]``."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
