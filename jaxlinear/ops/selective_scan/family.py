"""The selective scan as a family of recurrences, M elementwise: by blocks of time, and by its kernels."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import custom_vjp_primal_tree_values as values

from jaxlinear.ops import backends, dtypes, matrix_states, protocol
from jaxlinear.ops.diagonal import op as diagonal
from jaxlinear.pallas.parts import derivatives
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.selective_scan import kernel as kernels

# The size of one array of a block, which is all that XLA for CPUs holds of the block in cache at a time; 4 MiB and 256 KiB
# were slower. With too few tokens per block, the states that are kept, one per block, would be large beside the inputs.
_CPU_BLOCK_BYTES, _CPU_FEWEST = 1 << 20, 16


class Inputs(NamedTuple):
    """The inputs of a run. Zeros are tokens that change nothing. B and C have an axis for channels, of length 1 because all
    channels share them (``parallel.sequence``)."""

    x: jax.Array  # [B, T, D]
    dt: jax.Array  # [B, T, D]
    B: jax.Array  # [B, T, 1, N]
    C: jax.Array  # [B, T, 1, N]
    starts: jax.Array | None  # [B, T] bool, true where a document, and with it the state, begins


@dataclasses.dataclass(frozen=True)
class SelectiveScanMaps(protocol.Family):
    """The part of the family that concerns maps: a summary is ``(M, C)``, each ``[B, D, N]``."""

    def compose(self, earlier, later) -> tuple[jax.Array, jax.Array]:
        return later[0] * earlier[0], self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        return summary[0] * state + summary[1]


def no_state(x: jax.Array, dt: jax.Array, A: jax.Array | None, B: jax.Array, C: jax.Array) -> jax.Array:
    """Zeros ``[B, D, N]`` in the dtype of states, which is that of the whole computation."""
    wide = dtypes.wide(*(y.dtype for y in (x, dt, A, B, C) if y is not None))
    return jnp.zeros_like(x, shape=(x.shape[0], x.shape[2], B.shape[-1]), dtype=wide)


def decay_of(inputs: Inputs, A: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """M ``[B, D, N]`` of a run whose transitions are ``exp(dt_t A)``: that of the sum of the time steps."""
    dt = jnp.sum(inputs.dt.astype(dtype), axis=1)
    decay = jnp.exp(dt[..., None] * A.astype(dtype)[None])
    if inputs.starts is None:
        return decay
    return jnp.where(jnp.any(inputs.starts, axis=1)[:, None, None], jnp.zeros((), dtype), decay)


class _Run(NamedTuple):
    inputs: Inputs
    A: jax.Array | None
    kept: jax.Array  # M [B, D, N]
    added: jax.Array  # C [B, D, N]


@dataclasses.dataclass(frozen=True)
class SelectiveScan(SelectiveScanMaps):
    """The family (``protocol.Family``) of these recurrences, for when time is split over devices. ``constants`` is A.

    A run's outputs are recomputed from the state before it: correcting outputs computed from no state would cost as much.
    """

    chunk_size: int | None

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> _Run:
        none = no_state(inputs.x, inputs.dt, constants, inputs.B, inputs.C)
        added = self._run(inputs, constants, none)[1]
        if constants is None:
            kept = self._run(inputs._replace(x=jnp.zeros_like(inputs.x)), None, none + 1)[1]
        else:
            kept = decay_of(inputs, constants, none.dtype)
        return _Run(inputs, constants, kept, added)

    def summarise(self, run: _Run) -> tuple[jax.Array, jax.Array]:
        return run.kept, run.added

    def apply(self, run: _Run, state: jax.Array) -> jax.Array:
        return self.through(run, state)[0]

    def through(self, run: _Run, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._run(run.inputs, run.A, state)

    def _run(self, inputs, A, state):
        chunk = self.chunk_size or fitting(min(matrix_states.CHUNK, inputs.x.shape[1]), state)
        return in_blocks(chunk, inputs, A, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_blocks(chunk: int, inputs: Inputs, A: jax.Array | None, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y ``[B, T, D]`` and the state after the last token, one block after another."""
    return _blocks_forward(chunk, inputs, A, state)[0]


def _blocks_forward(chunk, inputs, A, state):
    length, count, padded = _blocks(chunk, inputs)

    def step(state, i):
        y, after = _block(protocol.part_of(padded, i, chunk), A, state)
        return after, (y, state[:, None])

    final, (y, before) = protocol.loop(step, state, count)
    y, before = protocol.named((y[:, :length], before))
    return (y, final), (inputs, A, before)


def _blocks_backward(chunk, residuals, cotangents):
    inputs, A, before = residuals
    d_y, d_final = cotangents
    length, count, padded = _blocks(chunk, (inputs, d_y))

    def step(carry, i):
        d_state, d_A = carry
        block, d_block = protocol.part_of(padded, i, chunk)
        state = lax.dynamic_index_in_dim(before, i, axis=1, keepdims=False)
        _, pullback = jax.vjp(_block, block, A, state)
        d_inputs, more, d_state = pullback((d_block, d_state))
        return (d_state, jax.tree.map(jnp.add, d_A, more)), d_inputs._replace(starts=None)

    # The gradients of A from all blocks are summed, and each has the dtype of the A that the blocks are given.
    A = None if A is None else A.astype(before.dtype)
    carry = d_final, jax.tree.map(jnp.zeros_like, A)
    (d_state, d_A), d_inputs = protocol.loop(step, carry, count, reverse=True)
    d_A = None if d_A is None else d_A.astype(residuals[1].dtype)
    return jax.tree.map(lambda y: y[:, :length], d_inputs), d_A, d_state


in_blocks.defvjp(_blocks_forward, _blocks_backward)


def _blocks(chunk: int, tree: Any) -> tuple[int, int, Any]:
    """T, the number of blocks, and the arrays ``[B, T, ...]`` padded to the length of the blocks."""
    length = jax.tree.leaves(tree)[0].shape[1]
    count = -(-length // chunk)
    return length, count, protocol.pad(tree, count * chunk)


def _block(inputs: Inputs, A: jax.Array | None, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One block. Its transitions and states are ``[B, c, N, D]``: channels come last because there are more of them."""
    x, dt, B, C = (y.astype(state.dtype) for y in inputs[:4])
    B, C = B.swapaxes(2, 3), C.swapaxes(2, 3)
    a = 1 - dt[:, :, None] * B**2 if A is None else jnp.exp(dt[:, :, None] * A.astype(dt.dtype).T[None, None])
    if inputs.starts is not None:
        a = jnp.where(inputs.starts[:, :, None, None], jnp.zeros((), a.dtype), a)
    loop = "recurrent" if backends.platform() == "cpu" else "associative"
    h, final = diagonal.linear_recurrence(a, B * (dt * x)[:, :, None], state.swapaxes(1, 2), backend=loop)
    return jnp.sum(h * C, axis=2), final.swapaxes(1, 2)


def fitting(chunk: int, state: jax.Array) -> int:
    """The tokens per block if that is not given."""
    if backends.platform() != "cpu":
        return chunk
    return min(chunk, max(_CPU_FEWEST, _CPU_BLOCK_BYTES // (state.size * state.dtype.itemsize)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def outputs(inputs: Inputs, A: jax.Array | None, state: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """``kernels.forward``, differentiable. If only the gradient of the state is asked for, only that is computed."""
    return _forward(inputs, A, state, target, keep=False)[:2]


def _forward(inputs, A, state, target, keep):
    x, dt, B, C, starts = inputs
    return kernels.forward(x, dt, A, B[:, :, 0], C[:, :, 0], state, starts, keep=keep, target=target)


def _outputs_forward(inputs, A, state, target):
    only_state = not any(x.perturbed for x in (*inputs[:4], A) if x is not None)
    given = derivatives.once(values((inputs, A, state)))
    y, final, before = _forward(*given, target, keep=not only_state)
    if not only_state:
        y, final, before = protocol.named((y, final, before))
    return (y, final), (*given[:2], before)


def _outputs_backward(target, residuals, cotangents):
    cotangents = derivatives.as_arrays(cotangents)
    (inputs, A, before), (d_y, d_final) = derivatives.once((residuals, cotangents))
    x, dt, B, C, starts = inputs
    B, C = B[:, :, 0], C[:, :, 0]
    if before is None:
        return None, None, kernels.state_gradient(dt, A, B, C, starts, d_y, d_final, target=target)
    d_x, d_dt, d_A, d_B, d_C, d_state = kernels.gradient(x, dt, A, B, C, starts, before, d_y, d_final, target=target)
    return Inputs(d_x, d_dt, d_B[:, :, None], d_C[:, :, None], None), d_A, d_state


outputs.defvjp(_outputs_forward, _outputs_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def summary(inputs: Inputs, A: jax.Array | None, target: Target) -> tuple[jax.Array, jax.Array]:
    """M and C of a run. It has no gradient: a run is differentiated by its outputs and the state after it."""
    x, dt, B, C, starts = inputs
    none = no_state(x, dt, A, B, C)
    run = functools.partial(kernels.summary, target=target)
    added = run(x, dt, A, B[:, :, 0], none, starts)
    if A is not None:
        return decay_of(inputs, A, none.dtype), added
    return run(jnp.zeros_like(x), dt, A, B[:, :, 0], none + 1, starts), added


def _summary_forward(inputs, A, target):
    return summary(inputs, A, target), None


summary.defvjp(_summary_forward, derivatives.refuse_that_of_a_map)


class _Given(NamedTuple):
    inputs: Inputs
    A: jax.Array | None


@dataclasses.dataclass(frozen=True)
class SelectiveScanKernel(SelectiveScanMaps):
    """The family ``selective_scan.SelectiveScan`` by the kernel.

    A run is just its inputs. Its map takes one pass over them, which writes nothing as long as the run; its outputs take
    another pass, once the state before the run is known.
    """

    target: Target

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> _Given:
        return _Given(inputs, constants)

    def summarise(self, run: _Given) -> tuple[jax.Array, jax.Array]:
        return summary(*run, self.target)

    def apply(self, run: _Given, state: jax.Array) -> jax.Array:
        return self.through(run, state)[0]

    def through(self, run: _Given, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return outputs(*run, state, self.target)
