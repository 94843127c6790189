"""What all families of recurrences have in common: a run of any number of tokens maps the state affinely, S -> M S + C.

A family defines how a run is summarised as (M, C), how such a summary advances a state, and how the run's outputs follow
from the state before it. Everything that splits time is written against these, once for all families: chunks here, devices
in ``jaxlinear.parallel``.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import custom_vjp_primal_tree_values as values

from jaxlinear.ops import backends, segments
from jaxlinear.pallas.parts import derivatives

Inputs = Any  # a tree of arrays [B, T, ...]
Constants = Any  # a tree of arrays that do not change with time and have no axis B
Run = Any  # what a family keeps of a run
Summary = Any  # (M, C)
State = Any  # [B, ...]

# Bytes of inputs in a group of chunks: what is computed from them is then still in the cache when it is read.
# Decays by channel compute more from their inputs than others do, and were slower with 2 MiB.
_CPU_GROUP_BYTES = 1_700_000

# A fold over at most so many chunks is unrolled: a loop spends most of each step on itself and the copies it makes.
_CHUNKS_WRITTEN_OUT = 16


class Family(Protocol):
    """One kind of transition. Hashable, so that it can be a static argument; all arrays are passed to its methods.

    Zeros at the end of ``inputs`` are tokens that change nothing: runs are padded with them.
    """

    def prepare(self, inputs: Inputs, constants: Constants) -> Run:
        """Everything about a run that does not depend on the state before it: what ``summarise`` and ``apply`` share."""

    def summarise(self, run: Run) -> Summary:
        """The run's map (M, C), float32, of a size independent of T. M is zero where a document ends in the run."""

    def compose(self, earlier: Summary, later: Summary) -> Summary:
        """The map of two runs, one after the other: (M2 M1, M2 C1 + C2)."""

    def advance(self, summary: Summary, state: State) -> State:
        """M S + C: the state after the run."""

    def apply(self, run: Run, state: State) -> jax.Array:
        """The run's outputs ``[B, T, ...]``, given the state before it."""

    def through(self, run: Run, state: State) -> tuple[jax.Array, State]:
        """The run's outputs and the state after it, for the backward pass: a family may override this with something
        cheaper to differentiate."""
        return self.apply(run, state), self.advance(self.summarise(run), state)

    def pack(self, transition: Any) -> Any:
        """The part of a run's M that does not follow from the constants and its length: what other devices need."""
        return transition

    def unpack(self, packed: Any, constants: Constants, length: int) -> Any:
        """Recovers the M of a run of ``length`` tokens."""
        return packed


class Kernels(Family, Protocol):
    """A family by its kernels. A run is just its inputs. Its map takes one pass over them, which writes nothing as long as
    the run; its outputs take another pass, once the state before the run is known."""

    TWICE: ClassVar[str] = "chunked"  # the backend that has gradients of gradients

    def forward(self, run: Run, state: State, *, keep: bool) -> tuple[jax.Array, State, Any]:
        """The outputs, the state after the run and, with ``keep``, the states before blocks of it, if ``gradient`` takes
        them."""

    def kept(self, run: Run, state: State, outputs: jax.Array, before: Any) -> tuple[Run, Any]:
        """What ``gradient`` takes of a run."""
        return run, before

    def gradient(self, run: Run, before: Any, d_outputs: jax.Array, d_final: State) -> tuple[Run, State]:
        """The gradients of the run and of the state before it."""

    def state_gradient(self, run: Run, d_outputs: jax.Array, d_final: State) -> State:
        """The gradient of the state before the run alone. No output is as long as the run."""

    def summary(self, run: Run) -> Summary:
        """The run's map. No output is as long as the run."""

    def summarise(self, run: Run) -> Summary:
        return _kernel_summary(self, run)

    def apply(self, run: Run, state: State) -> jax.Array:
        return self.through(run, state)[0]

    def through(self, run: Run, state: State) -> tuple[jax.Array, State]:
        return _kernel_outputs(self, run, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_outputs(family: Kernels, run: Run, state: State) -> tuple[jax.Array, State]:
    """``family.forward``, differentiable. If only the gradient of the state is asked for, only that is computed."""
    return family.forward(run, state, keep=False)[:2]


def _kernel_outputs_forward(family, run, state):
    only_state = not any(x.perturbed for x in jax.tree.leaves(run))
    run, state = derivatives.once(values((run, state)), family.TWICE)
    outputs, final, before = family.forward(run, state, keep=not only_state)
    if only_state:
        return (outputs, final), (run, None)
    outputs, final, before = named((outputs, final, before))
    return (outputs, final), (None, family.kept(run, state, outputs, before))


def _kernel_outputs_backward(family, residuals, cotangents):
    cotangents = derivatives.as_arrays(cotangents)
    (run, kept), (d_outputs, d_final) = derivatives.once((residuals, cotangents), family.TWICE)
    if kept is None:
        return None, family.state_gradient(run, d_outputs, d_final)
    return family.gradient(*kept, d_outputs, d_final)


_kernel_outputs.defvjp(_kernel_outputs_forward, _kernel_outputs_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_summary(family: Kernels, run: Run) -> Summary:
    """``family.summary``. It has no gradient: a run is differentiated by its outputs and the state after it."""
    return family.summary(run)


_kernel_summary.defvjp(lambda family, run: (family.summary(run), None), derivatives.refuse_that_of_a_map)


class TimeAxis(Protocol):
    """Where the time axis of an operation's arrays lies: on one device (``UNSHARDED``) or sharded over several."""

    def starts(self, segment_ids: jax.Array) -> jax.Array:
        """``segments.starts``."""

    def run(
        self, family: Family, chunk: int | None, inputs: Inputs, constants: Constants, state: State
    ) -> tuple[jax.Array, State]:
        """``chunked``; without a chunk size, all tokens that lie together are one chunk."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(family: Family, chunk: int, inputs: Inputs, constants: Constants, state: State) -> tuple[jax.Array, State]:
    """Runs a family in chunks of time: a group of chunks at once, except for the fold of their maps over the state.

    The inputs and the state before each chunk are kept for the backward pass; the rest is recomputed. In that pass, with
    D_n the gradient of chunk n's outputs with respect to the state before it, the gradient of the state after chunk n is
    G_n = D_{n+1} + M_{n+1}^T G_{n+1}, and a chunk's own gradients follow from those of its outputs and from G_n.

    Args:
      family: the kind of transition.
      chunk: tokens per chunk; T need not be a multiple of it.
      inputs: tree of ``[B, T, ...]``.
      constants: tree of arrays without time.
      state: before the first token, ``[B, ...]``.

    Returns:
      The outputs ``[B, T, ...]`` and the state after the last token.
    """
    return _forward(family, chunk, inputs, constants, state)[0]


def _forward(family, chunk, inputs, constants, state):
    batch, length = jax.tree.leaves(inputs)[0].shape[:2]
    groups, span = _groups(inputs, chunk)
    padded = pad(inputs, groups * span)

    def step(state, i):
        run = family.prepare(split(part_of(padded, i, span), chunk), constants)
        before, state = fold(family, by_chunk(family.summarise(run), batch, span // chunk), state)
        return state, (join(family.apply(run, flat(before)), batch, span), before)

    final, (outputs, before) = loop(step, state, groups)
    outputs, before = named((outputs[:, :length], before))
    return (outputs, final), (inputs, constants, before)


def _backward(family, chunk, residuals, cotangents):
    inputs, constants, before = residuals
    d_outputs, d_final = cotangents
    length = d_outputs.shape[1]
    groups, span = _groups(inputs, chunk)
    padded = pad((inputs, d_outputs), groups * span)

    def step(carry, i):
        d_state, d_constants = carry
        part, d_part = part_of(padded, i, span)
        gradients = Gradients(family, chunk, part, constants, part_of(before, i, span // chunk), d_part)
        after, d_state = gradients.fold_back(d_state)
        d_inputs, more = gradients.of_inputs(after)
        return (d_state, jax.tree.map(jnp.add, d_constants, more)), d_inputs

    carry = d_final, jax.tree.map(jnp.zeros_like, constants)
    (d_state, d_constants), d_inputs = loop(step, carry, groups, reverse=True)
    return jax.tree.map(lambda x: x[:, :length], d_inputs), d_constants, d_state


chunked.defvjp(_forward, _backward)


def named(tree: Any, name: str = "recurrence") -> Any:
    """The same arrays, named to be saved under remat (``ops.SAVED``); complex ones by their parts, since remat cannot save
    complex arrays (JAX 0.10.2)."""

    def one(x):
        if not jnp.issubdtype(x.dtype, jnp.complexfloating):
            return checkpoint_name(x, name)
        return lax.complex(*checkpoint_name((jnp.real(x), jnp.imag(x)), name))

    return jax.tree.map(one, tree)


class _Unsharded:
    starts = staticmethod(segments.starts)

    def run(self, family, chunk, inputs, constants, state):
        return chunked(family, chunk or jax.tree.leaves(inputs)[0].shape[1], inputs, constants, state)


UNSHARDED: TimeAxis = _Unsharded()


def as_one_chunk(
    family: Family, time: TimeAxis, inputs: Inputs, constants: Constants, state: State
) -> tuple[jax.Array, State]:
    """``time.run`` of a family of kernels, each shard as one chunk; where time is not sharded, just the kernel, whose map
    is not needed."""
    if time is UNSHARDED:
        return family.through(family.prepare(inputs, constants), state)
    return time.run(family, None, inputs, constants, state)


class Gradients:
    """The backward pass of a run in chunks, whose forward pass is recomputed.

    ``before``: the states before each chunk ``[B, N, ...]``.
    """

    def __init__(
        self, family: Family, chunk: int, inputs: Inputs, constants: Constants, before: State, d_outputs: jax.Array
    ):
        self._family, (self._batch, self._length) = family, d_outputs.shape[:2]
        self._chunks = -(-self._length // chunk)

        def local(chunks, constants, states):
            run = family.prepare(chunks, constants)
            return family.through(run, states), (run, family.summarise(run))

        chunks, states = split(inputs, chunk), flat(before)
        _, self._pullback, (run, self._summaries) = jax.vjp(local, chunks, constants, states, has_aux=True)
        self._d_outputs = split(d_outputs, chunk)
        _, of_states = jax.vjp(functools.partial(family.apply, run), states)
        self._through_outputs = by_chunk(of_states(self._d_outputs)[0], self._batch, self._chunks)  # D

    def fold_back(self, d_final: State) -> tuple[State, State]:
        """The gradients of the states after each chunk ``[B, N, ...]``, G, and of the state before the first."""
        summaries = by_chunk(self._summaries, self._batch, self._chunks)

        def step(d_state, n):
            through_state = transposed(self._family, _at(summaries, n)[0], d_state)
            d_before = jax.tree.map(jnp.add, _at(self._through_outputs, n), through_state)
            return d_before, jax.tree.map(lambda x: x[:, None], d_state)

        d_state, after = loop(step, d_final, _count(summaries), reverse=True, written_out=_CHUNKS_WRITTEN_OUT)
        return after, d_state

    def first_state_gradient(self) -> State:
        """The gradient of the outputs alone with respect to the state before the first chunk. For a single chunk it is D,
        and the chunk's map is not needed."""
        if _count(self._through_outputs) == 1:
            return _at(self._through_outputs, 0)
        return self.fold_back(jax.tree.map(jnp.zeros_like, _at(self._through_outputs, 0)))[1]

    def of_inputs(self, after: State) -> tuple[Inputs, Constants]:
        """The gradients of the inputs ``[B, T, ...]`` (None for inputs that have none) and of the constants."""
        d_chunks, d_constants, _ = self._pullback((self._d_outputs, flat(after)))
        return jax.tree.map(lambda x: join(x, self._batch, self._length), d_chunks), d_constants


def fold(family: Family, summaries: Summary, state: State) -> tuple[State, State]:
    """The states before each chunk ``[B, N, ...]`` and after the last, from the chunks' maps ``[B, N, ...]``."""

    def step(state, n):
        return family.advance(_at(summaries, n), state), jax.tree.map(lambda x: x[:, None], state)

    final, before = loop(step, state, _count(summaries), written_out=_CHUNKS_WRITTEN_OUT)
    return before, final


def whole(family: Family, summaries: Summary) -> Summary:
    """The map of all chunks in sequence, from their maps ``[B, N, ...]``."""
    step = lambda n, total: family.compose(total, _at(summaries, n))  # noqa: E731
    return lax.fori_loop(1, _count(summaries), step, _at(summaries, 0))


def transposed(family: Family, transition: Any, d_state: State) -> State:
    """M^T d_state."""
    none = jax.tree.map(jnp.zeros_like, d_state)
    return jax.linear_transpose(lambda state: family.advance((transition, none), state), d_state)(d_state)[0]


def loop(step: Callable, carry: Any, count: int, *, reverse: bool = False, written_out: int = 1) -> tuple[Any, Any]:
    """``lax.scan`` of ``step(carry, i)``, whose outputs ``[B, n, ...]`` are joined along axis 1: ``[B, count * n, ...]``.
    Up to ``written_out`` steps are unrolled."""
    if count <= written_out:
        pieces = [None] * count
        for i in reversed(range(count)) if reverse else range(count):
            carry, pieces[i] = step(carry, i)
        return carry, jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *pieces)

    def place(i, loop_carry):
        i = count - 1 - i if reverse else i
        carry, pieces = step(loop_carry[0], i)

        def put(row, piece):
            return lax.dynamic_update_slice_in_dim(row, piece, i * piece.shape[1], axis=1)

        return carry, jax.tree.map(put, loop_carry[1], pieces)

    def row(piece):
        return jnp.zeros_like(piece, shape=(piece.shape[0], count * piece.shape[1], *piece.shape[2:]))

    _, pieces = jax.eval_shape(step, carry, jnp.zeros((), jnp.int32))
    return lax.fori_loop(0, count, place, (carry, jax.tree.map(row, pieces)))


def _groups(inputs: Inputs, chunk: int) -> tuple[int, int]:
    """The number of groups of chunks, which are taken one after the other, and the tokens per group.

    On CPU a group has as many chunks as fit in ``_CPU_GROUP_BYTES``; elsewhere all of them. Groups are equal, so
    only the last chunk is padded.
    """
    leaves = jax.tree.leaves(inputs)
    chunks = -(-leaves[0].shape[1] // chunk)
    together = chunks
    if backends.platform() == "cpu":
        size = sum(x.size * x.dtype.itemsize for x in leaves)
        fitting = _CPU_GROUP_BYTES * chunks // max(size, 1)
        together = next(n for n in range(max(1, min(chunks, fitting)), 0, -1) if chunks % n == 0)
    return chunks // together, together * chunk


def pad(tree: Any, length: int) -> Any:
    """``[B, T, ...]`` to ``[B, length, ...]``, with zeros at the end."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2))), tree)


def part_of(tree: Any, i, size: int) -> Any:
    """``[B, T, ...]`` -> ``[B, size, ...]``, the i-th such part."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size, axis=1), tree)


def split(tree: Any, chunk: int) -> Any:
    """``[B, T, ...]`` -> ``[B * N, chunk, ...]``, padded with zeros at the end."""
    length = jax.tree.leaves(tree)[0].shape[1]
    tree = pad(tree, length + -length % chunk)
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * (x.shape[1] // chunk), chunk, *x.shape[2:]), tree)


def join(x: jax.Array, batch: int, length: int) -> jax.Array | None:
    """The inverse of ``split``; None for the gradient of an array that has none (bools)."""
    if x.dtype == jax.dtypes.float0:
        return None
    return x.reshape(batch, -(-length // x.shape[1]) * x.shape[1], *x.shape[2:])[:, :length]


def by_chunk(tree: Any, batch: int, chunks: int = -1) -> Any:
    """``[B * N, ...]`` -> ``[B, N, ...]``. N follows from B, unless B is 0."""
    return jax.tree.map(lambda x: x.reshape(batch, chunks, *x.shape[1:]), tree)


def flat(tree: Any) -> Any:
    """``[B, N, ...]`` -> ``[B * N, ...]``."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def _count(summaries: Summary) -> int:
    return jax.tree.leaves(summaries)[0].shape[1]


def _at(tree, n):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, n, axis=1, keepdims=False), tree)
