"""The selective scan: S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T,  y_t = S_t C_t, with N state numbers per channel.

The recurrence of Mamba (Gu and Dao 2023, arXiv:2312.00752), and with S_t = (1 - dt_t (B_t^T)^2) S_{t-1} + (dt_t x_t) B_t^T
that of Longhorn (Liu et al. 2024, arXiv:2407.14207). Every number of the state decays on its own, so a chunk cannot be
computed by matrix products. Time is taken in blocks whose transitions are materialised, N for each channel of a token, and
then dropped: what is kept are the inputs and the state before each block.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, matrix_states, protocol
from jaxlinear.ops.backends import Form
from jaxlinear.ops.selective_scan.family import Inputs, SelectiveScan, SelectiveScanKernel, fitting, in_blocks, no_state
from jaxlinear.ops.spec import TIME, Arrays, Axes, Spec
from jaxlinear.pallas.selective_scan import blocks

WIDEST = 128  # the largest N where kernels are compiled
_TAKEN = (np.dtype(np.float32), np.dtype(jnp.bfloat16))


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
    time: protocol.TimeAxis = protocol.UNSHARDED,
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
      time: where the time axis lies; on one device by default.

    Returns:
      y ``[B, T, D]`` in the dtype of x, and the state after the last token ``[B, D, N]`` in float32 (float64 if x, dt, A, B
      or C is), the dtype of the whole computation.

    ``auto`` uses the loop for at most 8 tokens, unless it is given a chunk size; for more, the kernel on TPU
    and GPU, and blocks on CPU and, with a log line, where the kernel does not run.
    """
    x, dt, B, C = (jnp.asarray(y) for y in (x, dt, B, C))
    A = None if A is None else jnp.asarray(A)
    _check_shapes(x, dt, A, B, C, initial_state)
    sharded = time is not protocol.UNSHARDED
    form = choose(x, dt, A, B, C, chunk_size=chunk_size, backend=backend, sharded=sharded)
    batch, length, width = x.shape
    states = B.shape[2]
    segment_ids = checks.segment_ids("selective_scan", segment_ids, batch, length)
    starts = None if segment_ids is None else time.starts(segment_ids)
    inputs = Inputs(x, dt, B[:, :, None], C[:, :, None], starts)
    none = no_state(x, dt, A, B, C)
    initial_state = none if initial_state is None else jnp.asarray(initial_state).astype(none.dtype)
    if 0 in (batch, length, width, states):
        return jnp.zeros_like(x), initial_state
    if form.is_kernel:
        y, final = protocol.as_one_chunk(SelectiveScanKernel(backends.target()), time, inputs, A, initial_state)
    elif form.name == "recurrent":
        y, final = _recurrent(inputs, A, initial_state)
    elif not sharded:
        assert form.chunk is not None
        y, final = in_blocks(chunk_size or fitting(form.chunk, initial_state), inputs, A, initial_state)
    else:
        y, final = time.run(SelectiveScan(chunk_size), None, inputs, A, initial_state)
    return y.astype(x.dtype), final


def choose(
    x: Any,
    dt: Any,
    A: Any = None,
    B: Any = None,
    C: Any = None,
    *,
    chunk_size: int | None = None,
    backend: str | Form = "auto",
    sharded: bool = False,
    **_: Any,
) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    arrays = x, dt, B, C, *(() if A is None else (A,))
    refused = functools.partial(refusal, arrays, x.shape[2], B.shape[2], chunk_size)
    return matrix_states.choose(
        "selective_scan",
        backend,
        (x.shape, B.shape),
        refused,
        length=x.shape[1],
        chunk_size=chunk_size,
        sharded=sharded,
    )


def _axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    return {
        **dict.fromkeys(("x", "dt"), (*TIME, axis)),
        **dict.fromkeys(("B", "C", "segment_ids"), TIME),
        "A": (axis,),
        "initial_state": ("batch", axis),
    }


def _complete(arrays: Arrays, form: Form) -> Arrays:
    if not form.is_kernel:
        return arrays
    x, dt, B, C = (arrays[name] for name in ("x", "dt", "B", "C"))
    none = no_state(x, dt, arrays.get("A"), B, C)
    # Widened, as their gradients are summed over the devices, each of which has some of the channels.
    B, C = (y.astype(dtypes.wide(y.dtype)) for y in (B, C))
    return {"initial_state": none} | arrays | {"B": B, "C": C}


def flops(channels: int, states: int) -> int:
    """FLOPs of one token, forward: for each number of the state its decay (1), update (3) and read (2)."""
    return 6 * channels * states


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


def refusal(
    arrays: tuple[jax.Array, ...], channels: int, states: int, chunk_size: int | None, platform: str
) -> str | None:
    """Why the kernels do not run, or None. On other platforms than TPU and GPU they are interpreted, and take all but a
    chunk size. ``arrays``: x, dt, B, C and A, if there is one; ``channels``: those on one device; ``states``: N."""
    if chunk_size is not None:
        return f"the kernel chooses its own blocks and takes no chunk_size={chunk_size}"
    if platform not in backends.COMPILED:
        return None
    for x in arrays:
        if x.dtype not in _TAKEN:
            return f"the kernel takes {' and '.join(map(str, _TAKEN))}, not {x.dtype}"
    if states > WIDEST:
        return f"the kernel takes N up to {WIDEST}, not {states}"
    if platform == "tpu" and channels > (most := blocks.tpu_channels(states)):
        return (
            f"the kernel takes up to {most:,} channels of {states} numbers per device, the most that fit in VMEM, not "
            f"{channels:,}; mesh.tensor splits them"
        )
    return None


SELECTIVE_SCAN = Spec(
    selective_scan,
    choose,
    _axes,
    results=("x", "initial_state"),
    axis="recurrent",
    over_time="recurrence",
    complete=_complete,
)
