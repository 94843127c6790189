"""The selective scan: S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T,  y_t = S_t C_t, with N state numbers per channel.

The recurrence of Mamba (Gu and Dao 2023, arXiv:2312.00752), and with S_t = (1 - dt_t (B_t^T)^2) S_{t-1} + (dt_t x_t) B_t^T
that of Longhorn (Liu et al. 2024, arXiv:2407.14207). Every number of the state decays on its own, so a chunk cannot be
computed by matrix products. Time is taken in blocks whose transitions are materialised, N for each channel of a token, and
then dropped: what is kept are the inputs and the state before each block.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.errors import UserError
from jaxlinear.ops import (
    backends,
    calls,
    checks,
    diagonal,
    matrix_states,
    recurrence,
    selective_scan_kernel,
    selective_scan_maps,
)
from jaxlinear.ops.selective_scan_kernel import SelectiveScanKernel
from jaxlinear.ops.selective_scan_maps import Inputs, SelectiveScanMaps

# The size of one array of a block, which is all that XLA for CPUs holds of the block in cache at a time; 4 MiB and 256 KiB
# were slower. With too few tokens per block, the states that are kept, one per block, would be large beside the inputs.
_CPU_BLOCK_BYTES, _CPU_FEWEST = 1 << 20, 16


@calls.recorded
def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array | None,
    B: jax.Array,
    C: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    runner: recurrence.Runner = recurrence.WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``S_t = exp(dt_t A) * S_{t-1} + (dt_t x_t) B_t^T`` and reads ``y_t = S_t C_t``.

    Args:
      x: ``[B, T, D]``.
      dt: ``[B, T, D]``, the time step of each channel, at least 0.
      A: ``[D, N]``, at most 0; or None for the transition ``1 - dt_t (B_t^T)^2``, for which dt times the square of each
        number of B must be at most 1.
      B, C: ``[B, T, N]``, shared by all channels: B writes to the state and C reads it.
      initial_state: ``[B, D, N]``, the state before the first token, of that token's document; None means zeros.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id.
      chunk_size: tokens per block of ``"chunked"``. None is 64, or on CPU fewer if that fits the cache better. Affects only
        speed, memory and rounding.
      backend: ``"recurrent"`` (a loop over time), ``"chunked"`` (blocks of time, each a ``linear_recurrence`` that is
        recomputed for the gradients), ``"pallas"`` (a kernel for TPU and GPU, interpreted elsewhere) or ``"auto"``.
      runner: how time is spread over devices; on one device by default.

    Returns:
      y ``[B, T, D]`` in the dtype of x, and the state after the last token ``[B, D, N]`` in float32 (float64 if x, dt, A, B
      or C is), the dtype of the whole computation.

    ``auto`` uses the loop for at most 8 tokens, unless it is given a chunk size; for more, the kernel on TPU
    and GPU, and blocks on CPU and, with a log line, where the kernel does not run.
    """
    x, dt, B, C = (jnp.asarray(y) for y in (x, dt, B, C))
    A = None if A is None else jnp.asarray(A)
    _check_shapes(x, dt, A, B, C, initial_state)
    backend = choose(backend, x, dt, A, B, C, chunk_size, runner)
    batch, length, width = x.shape
    states = B.shape[2]
    chunk = matrix_states.choose_chunk("selective_scan", backend, chunk_size, length, runner)
    segment_ids = checks.segment_ids("selective_scan", segment_ids, batch, length)
    starts = None if segment_ids is None else runner.starts(segment_ids)
    inputs = Inputs(x, dt, B[:, :, None], C[:, :, None], starts)
    none = selective_scan_maps.no_state(x, dt, A, B, C)
    initial_state = none if initial_state is None else jnp.asarray(initial_state).astype(none.dtype)
    if 0 in (batch, length, width, states):
        return jnp.zeros_like(x), initial_state
    if backend == "pallas":
        y, final = recurrence.in_one_run(SelectiveScanKernel(backends.target()), runner, inputs, A, initial_state)
    elif chunk is None:
        y, final = _recurrent(inputs, A, initial_state)
    elif runner is recurrence.WHOLE:
        y, final = _in_blocks(chunk_size or _fitting(chunk, initial_state), inputs, A, initial_state)
    else:
        y, final = runner.run(SelectiveScan(chunk_size), None, inputs, A, initial_state)
    return y.astype(x.dtype), final


def choose(
    backend: str,
    x: jax.Array | jax.ShapeDtypeStruct,
    dt: jax.Array,
    A: jax.Array | None,
    B: jax.Array,
    C: jax.Array,
    chunk_size: int | None = None,
    runner: recurrence.Runner = recurrence.WHOLE,
) -> str:
    """``"pallas"`` if ``selective_scan`` uses the kernel, else the backend as given."""
    backends.check("selective_scan", backend, ("recurrent", "chunked", "pallas"))
    matrix_states.check_chunk("selective_scan", backend, chunk_size)
    few = chunk_size is None and x.shape[1] <= matrix_states.FEW_TOKENS and runner is recurrence.WHOLE
    arrays = x, dt, B, C, *(() if A is None else (A,))
    refused = functools.partial(selective_scan_kernel.refusal, arrays, runner.share(x.shape[2]), B.shape[2], chunk_size)
    return backends.kernel_or_chunks("selective_scan", backend, few, (x.shape, B.shape), refused)


class _Run(NamedTuple):
    inputs: Inputs
    A: jax.Array | None
    kept: jax.Array  # M [B, D, N]
    added: jax.Array  # C [B, D, N]


@dataclasses.dataclass(frozen=True)
class SelectiveScan(SelectiveScanMaps):
    """The family (``recurrence.Family``) of these recurrences, for when time is split over devices. ``constants`` is A.

    A run's outputs are recomputed from the state before it: correcting outputs computed from no state would cost as much.
    """

    chunk_size: int | None

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> _Run:
        none = selective_scan_maps.no_state(inputs.x, inputs.dt, constants, inputs.B, inputs.C)
        added = self._run(inputs, constants, none)[1]
        if constants is None:
            kept = self._run(inputs._replace(x=jnp.zeros_like(inputs.x)), None, none + 1)[1]
        else:
            kept = selective_scan_maps.kept(inputs, constants, none.dtype)
        return _Run(inputs, constants, kept, added)

    def summarise(self, run: _Run) -> tuple[jax.Array, jax.Array]:
        return run.kept, run.added

    def apply(self, run: _Run, state: jax.Array) -> jax.Array:
        return self.through(run, state)[0]

    def through(self, run: _Run, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._run(run.inputs, run.A, state)

    def _run(self, inputs, A, state):
        chunk = self.chunk_size or _fitting(min(matrix_states.CHUNK, inputs.x.shape[1]), state)
        return _in_blocks(chunk, inputs, A, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(chunk: int, inputs: Inputs, A: jax.Array | None, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y ``[B, T, D]`` and the state after the last token, one block after another."""
    return _forward(chunk, inputs, A, state)[0]


def _forward(chunk, inputs, A, state):
    length, count, padded = _blocks(chunk, inputs)

    def step(state, i):
        y, after = _block(recurrence.part_of(padded, i, chunk), A, state)
        return after, (y, state[:, None])

    final, (y, before) = recurrence.loop(step, state, count)
    y, before = recurrence.named((y[:, :length], before))
    return (y, final), (inputs, A, before)


def _backward(chunk, residuals, cotangents):
    inputs, A, before = residuals
    d_y, d_final = cotangents
    length, count, padded = _blocks(chunk, (inputs, d_y))

    def step(carry, i):
        d_state, d_A = carry
        block, d_block = recurrence.part_of(padded, i, chunk)
        state = lax.dynamic_index_in_dim(before, i, axis=1, keepdims=False)
        _, pullback = jax.vjp(_block, block, A, state)
        d_inputs, more, d_state = pullback((d_block, d_state))
        return (d_state, jax.tree.map(jnp.add, d_A, more)), d_inputs._replace(starts=None)

    # The gradients of A from all blocks are summed, and each has the dtype of the A that the blocks are given.
    A = None if A is None else A.astype(before.dtype)
    carry = d_final, jax.tree.map(jnp.zeros_like, A)
    (d_state, d_A), d_inputs = recurrence.loop(step, carry, count, reverse=True)
    d_A = None if d_A is None else d_A.astype(residuals[1].dtype)
    return jax.tree.map(lambda y: y[:, :length], d_inputs), d_A, d_state


_in_blocks.defvjp(_forward, _backward)


def _blocks(chunk: int, tree: Any) -> tuple[int, int, Any]:
    """T, the number of blocks, and the arrays ``[B, T, ...]`` padded to the length of the blocks."""
    length = jax.tree.leaves(tree)[0].shape[1]
    count = -(-length // chunk)
    return length, count, recurrence.pad(tree, count * chunk)


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


def _recurrent(inputs: Inputs, A: jax.Array | None, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A loop over time."""

    def step(state, token):
        x, dt, B, C = (y.astype(state.dtype) for y in token[:4])
        a = 1 - dt[..., None] * B**2 if A is None else jnp.exp(_outer(dt, A))
        if token.starts is not None:
            a = jnp.where(token.starts[:, None, None], jnp.zeros((), a.dtype), a)
        state = a * state + (dt * x)[..., None] * B
        return state, jnp.sum(state * C, axis=2)

    final, y = lax.scan(step, state, jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), inputs))
    return jnp.moveaxis(y, 0, 1), final


def _outer(dt: jax.Array, A: jax.Array) -> jax.Array:
    """dt A ``[B, D, N]`` for one time step ``[B, D]``."""
    return dt[..., None] * A.astype(dt.dtype)[None]


def _fitting(chunk: int, state: jax.Array) -> int:
    """The tokens per block if that is not given."""
    if backends.platform() != "cpu":
        return chunk
    return min(chunk, max(_CPU_FEWEST, _CPU_BLOCK_BYTES // (state.size * state.dtype.itemsize)))


def _check_shapes(x, dt, A, B, C, initial_state) -> None:
    operation = "selective_scan"
    checks.axes(operation, "B T D", x=x)
    checks.axes(operation, "B T N", B=B)
    checks.numbers(operation, x=x, dt=dt, B=B, C=C, **({} if A is None else {"A": A}))
    checks.real(operation, initial_state=initial_state)
    batch, length, width = x.shape
    states = B.shape[2]
    if dt.shape != x.shape:
        raise UserError(f"{operation}: dt {dt.shape} does not have the shape of x {x.shape}")
    if B.shape[:2] != (batch, length):
        raise UserError(f"{operation}: B {B.shape} does not fit x {x.shape}; it must be [B, T, N]")
    if C.shape != B.shape:
        raise UserError(f"{operation}: C {C.shape} does not have the shape of B {B.shape}")
    if A is not None and A.shape != (width, states):
        raise UserError(f"{operation}: A is {A.shape}, not [D, N] = {(width, states)}")
    if initial_state is not None and jnp.shape(initial_state) != (batch, width, states):
        raise UserError(
            f"{operation}: the initial state is {jnp.shape(initial_state)}, not [B, D, N] = {(batch, width, states)}"
        )
