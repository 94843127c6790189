"""The selective scan as a family of recurrences, M elementwise: by blocks of time, and by its kernels."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import backends, dtypes, matrix_states, protocol
from jaxlinear.ops.diagonal import op as diagonal
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.selective_scan import gpu, tpu
from jaxlinear.pallas.selective_scan.plan import Arguments, Plan

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


class _Given(NamedTuple):
    inputs: Inputs
    A: jax.Array | None


@dataclasses.dataclass(frozen=True)
class SelectiveScanKernel(protocol.Kernels, SelectiveScanMaps):
    """The family ``SelectiveScan`` by the kernels."""

    target: Target

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> _Given:
        return _Given(inputs, constants)

    def forward(self, run: _Given, state: jax.Array, *, keep: bool):
        y, final, *before = self._call("forward", run, state, keep=keep)
        return y, final.swapaxes(1, 2), before[0] if keep else None

    def gradient(self, run: _Given, before: jax.Array, d_outputs: jax.Array, d_final: jax.Array):
        (x, dt, B, C, _), A = run
        d_x, d_dt, d_B, d_C, d_state, *d_A = self._call("gradient", run, d_final, before=before, d_y=d_outputs)
        d_B, d_C = d_B[:, :, None].astype(B.dtype), d_C[:, :, None].astype(C.dtype)
        d_inputs = Inputs(d_x.astype(x.dtype), d_dt.astype(dt.dtype), d_B, d_C, None)
        return _Given(d_inputs, None if A is None else d_A[0].T.astype(A.dtype)), d_state.swapaxes(1, 2)

    def state_gradient(self, run: _Given, d_outputs: jax.Array, d_final: jax.Array) -> jax.Array:
        needed = None if run.A is not None else run.inputs.B[:, :, 0]
        (d_state,) = self._call("state_gradient", run, d_final, x=None, B=needed, d_y=d_outputs)
        return d_state.swapaxes(1, 2)

    def summary(self, run: _Given) -> tuple[jax.Array, jax.Array]:
        inputs, A = run
        none = no_state(*inputs[:2], A, *inputs[2:4])
        (added,) = self._call("summary", run, none, C=None)
        if A is not None:
            return decay_of(inputs, A, none.dtype), added.swapaxes(1, 2)
        unwritten = run._replace(inputs=inputs._replace(x=jnp.zeros_like(inputs.x)))
        (kept,) = self._call("summary", unwritten, none + 1, C=None)
        return kept.swapaxes(1, 2), added.swapaxes(1, 2)

    def _call(self, kind: str, run: _Given, state: jax.Array, *, keep: bool = False, **arrays: Any) -> list[jax.Array]:
        (x, dt, B, C, starts), A = run
        rates = None if A is None else A.T.astype(state.dtype)
        arguments = Arguments(x, dt, rates, B[:, :, 0], C[:, :, 0], state.swapaxes(1, 2), starts)._replace(**arrays)
        plan = Plan(kind, keep, A is not None, starts is not None)
        return (gpu if self.target.platform == "gpu" else tpu).call(plan, arguments, self.target)
