"""What recurrences with a ``[K, V]`` state per head share: shapes, the choice of backend and chunk, decays in a chunk."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, checks, decay, dtypes, protocol
from jaxlinear.ops.backends import Form
from jaxlinear.pallas.parts.target import Target

FEW_TOKENS = 8  # up to which the loop over time is faster
CHUNK = 64

# The limits of K, and of V per kernel, where kernels are compiled; in bfloat16 V may be twice as wide. Kernels that share V
# each recompute what follows from the keys.
NARROWEST, WIDEST, WIDEST_VALUES = 16, 256, 512
_TAKEN = {"tpu": (np.dtype(np.float32), np.dtype(jnp.bfloat16)), "gpu": (np.dtype(jnp.bfloat16),)}


def choose(
    operation: str,
    backend: str | Form,
    shapes: tuple[tuple[int, ...], ...],
    refusal: Callable[[str], str | None],
    *,
    length: int,
    chunk_size: int | None,
    sharded: bool,
    chunk: int = CHUNK,
) -> Form:
    """The form of an operation that has a loop over time, chunks and a kernel; with the tokens per chunk, except for a
    kernel, which has its own, and a loop. ``length``: tokens, or updates; ``chunk``: the most that a chunk has unless
    ``chunk_size`` says otherwise. The rest is that of ``backends.choose``."""
    if isinstance(backend, Form):
        return backend
    check_chunk(operation, backend, chunk_size)
    if sharded and backend == "recurrent":
        raise UserError(f"{operation}: backend='recurrent' does not run over several devices; use 'chunked'")
    few = "recurrent" if chunk_size is None and length <= FEW_TOKENS and not sharded else None
    forms = "recurrent", "chunked", "pallas"
    form = backends.choose(operation, backend, forms, plain="chunked", few=few, shapes=shapes, refusal=refusal)
    if form.name != "chunked":
        return form
    return form._replace(chunk=int(chunk_size or min(chunk, 1 << max(length - 1, 0).bit_length())))


def is_by_channel(log_decay: jax.Array | None) -> bool:
    """Whether a log decay is ``[B, T, H, K]``."""
    return log_decay is not None and jnp.ndim(log_decay) == 4


def check_chunk(operation: str, backend: str, chunk_size: int | None) -> None:
    """Raises ``UserError`` for an invalid chunk size, or for one given to a backend that has no chunks."""
    if chunk_size is None:
        return
    if backend == "recurrent":
        raise UserError(f"{operation}: chunk_size={chunk_size} is for backend='chunked'; 'recurrent' has no chunks")
    if not isinstance(chunk_size, int | np.integer) or chunk_size < 1:
        raise UserError(f"{operation}: chunk_size={chunk_size} must be a whole number of tokens, at least 1")


def is_shared(q: jax.Array, v: jax.Array) -> bool:
    """Whether all heads share queries and keys."""
    return q.ndim == v.ndim == 4 and q.shape[2] == 1 != v.shape[2]


def for_every_head(x: jax.Array, heads: int) -> jax.Array:
    """``[B, T, 1, K]`` -> ``[B, T, H, K]``, whose gradient is summed in float32 at least."""
    wide = x.astype(dtypes.wide(x.dtype))
    return jnp.broadcast_to(wide, (*x.shape[:2], heads, x.shape[3])).astype(x.dtype)


def check_shapes(operation, q, k, v, log_decay, initial_state, *, constant_decay: bool, may_share: bool) -> None:
    """Raises ``UserError`` for shapes that do not match. ``may_share``: whether q and k may be ``[B, T, 1, K]``."""
    checks.axes(operation, "B T H K", q=q)
    checks.numbers(operation, q=q, k=k, v=v)
    checks.real(operation, log_decay=log_decay, initial_state=initial_state)
    batch, length, heads, width = q.shape
    if may_share and is_shared(q, v):
        heads = v.shape[2]
    fitting = {(batch, length, heads), (batch, length, heads, width)} | ({(heads,)} if constant_decay else set())
    if k.shape != q.shape:
        raise UserError(f"{operation}: keys {k.shape} do not have the shape of the queries {q.shape}")
    if v.shape[:3] != (batch, length, heads) or v.ndim != 4:
        raise UserError(f"{operation}: values {v.shape} do not fit queries {q.shape}; they must be [B, T, H, V]")
    if log_decay is not None and jnp.shape(log_decay) not in fitting:
        names = " or ".join((["[H]"] if constant_decay else []) + ["[B, T, H]", "[B, T, H, K]"])
        raise UserError(
            f"{operation}: log_decay {jnp.shape(log_decay)} does not fit queries {q.shape}; it must be {names}"
        )
    if initial_state is not None and jnp.shape(initial_state) != (batch, heads, width, v.shape[-1]):
        raise UserError(
            f"{operation}: the initial state is {jnp.shape(initial_state)}, not [B, H, K, V] = "
            f"{(batch, heads, width, v.shape[-1])}"
        )


def by_channel(log_decay, shape, dtype) -> jax.Array:
    """Any log decay as ``[B, T, H, K]``."""
    if log_decay is None:
        return jnp.zeros(shape, dtype)
    log_decay = jnp.asarray(log_decay).astype(dtype)
    missing = {1: (0, 1, 3), 3: (3,), 4: ()}[log_decay.ndim]
    return jnp.broadcast_to(jnp.expand_dims(log_decay, missing), shape)


class Decays(NamedTuple):
    """The decays of a run of T tokens, heads before time; documents that end in the run are kept apart."""

    log_decay: jax.Array | None  # [B, H, T, K or 1], of each token; None if nothing decays
    since_start: jax.Array | None  # [B, H, T, K or 1], of the state before the run, for each token; None: 1 for all
    until_end: jax.Array | None  # [B, H, T, K or 1], of each token, for the state after the run; None: 1 for all
    kept: jax.Array  # [B, H, K or 1], of the state before the run, for the one after it
    same: jax.Array | None  # [B, 1, T, T] bool, whether two tokens are in one document; None: all are

    def within_documents(self, pairs: jax.Array) -> jax.Array:
        """Values for pairs of tokens, ``[B, H, T, T]``, zeroed where the two are in different documents."""
        return pairs if self.same is None else _where(self.same, pairs)


def decays_of_run(log_decay: jax.Array | None, starts: jax.Array | None, like: jax.Array, dtype: jnp.dtype) -> Decays:
    """From log decays ``[B, T, H]`` or ``[B, T, H, K]`` and document starts ``[B, T]`` bool, in ``dtype``. ``like``
    ``[B, H, T, K]`` supplies the number of heads if there is no decay."""
    since_start, until_end, kept, same = None, None, jnp.ones_like(like[:, :, :1, 0], dtype=dtype), None
    if log_decay is not None:
        log_decay = log_decay.swapaxes(1, 2).astype(dtype)
        log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        since_start, until_end = decay.since_start(log_decay), decay.until_end(log_decay)
        kept = decay.whole(log_decay)
    if starts is not None:
        run = jnp.cumsum(starts, axis=1, dtype=jnp.int32)[:, None]
        same = run[..., :, None] == run[..., None, :]
        since_start = _where((run == 0)[..., None], since_start, dtype)
        until_end = _where((run == run[..., -1:])[..., None], until_end, dtype)
        kept = _where(run[..., -1:] == 0, kept)
    return Decays(log_decay, since_start, until_end, kept, same)


def _where(condition: jax.Array, x: jax.Array | None, dtype: jnp.dtype | None = None) -> jax.Array:
    """x, or 1 if None, where the condition holds, else 0."""
    return condition.astype(dtype) if x is None else jnp.where(condition, x, jnp.zeros((), x.dtype))


def no_state(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Zeros ``[B, H, K, V]`` in the dtype of states."""
    shape = q.shape[0], v.shape[2], q.shape[-1], v.shape[-1]
    return jnp.zeros_like(q, shape=shape, dtype=dtypes.wide(q.dtype, k.dtype, v.dtype))


def refusal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chunk_size: int | None,
    platform: str,
    *,
    chunks: tuple[int, int],
    of_heads: Callable[[int, tuple[int, ...], int], str | None],
) -> str | None:
    """Why kernels do not run, or None. On other platforms than TPU and GPU they are interpreted, and the only limit is on
    the size of chunks. On GPU, float32 products would take more registers than there are.

    ``chunks``: the fewest and the most tokens per chunk on this platform.
    ``of_heads(H, (K, V per kernel), bytes per number)``: why such heads do not fit on TPU, or None; the widths are V alone
    if heads share queries and keys.
    """
    least, most = chunks
    if chunk_size is not None and (int(chunk_size).bit_count() != 1 or not least <= chunk_size <= most):
        sizes = f"{least} tokens" if least == most else f"a power of two from {least} to {most} tokens"
        return f"the kernel takes chunks of {sizes}, not of {chunk_size}"
    if platform not in backends.COMPILED:
        return None
    taken = _TAKEN[platform]
    for x in (q, k, v):
        if x.dtype not in taken:
            return f"the kernel takes {' and '.join(map(str, taken))}, not {x.dtype}"
    heads, keys, values = v.shape[2], q.shape[3], v.shape[3]
    wrong = f"K = {keys}" if not NARROWEST <= keys <= WIDEST else f"V = {values}" if values < NARROWEST else None
    if wrong:
        return f"the kernel takes K from {NARROWEST} to {WIDEST} and V of at least {NARROWEST}, not {wrong}"
    size = product_bytes(q, k, v)
    pieces = value_pieces(values, size)
    if pieces is None:
        return (
            f"the kernel takes V in equal parts of at most {_widest(size)}, and V = {values} cannot be split that way"
        )
    widths = (keys, values // pieces) if q.shape[2] == heads else (values // pieces,)
    return of_heads(heads, widths, size) if platform == "tpu" else None


def value_pieces(width: int, size: int) -> int | None:
    """How many kernels share V, for numbers of ``size`` bytes: the columns of a state are independent. None if they cannot
    share it."""
    fewest = -(-width // _widest(size))
    return next((pieces for pieces in range(fewest, 2 * fewest + 1) if width % pieces == 0), None)


def _widest(size: int) -> int:
    return WIDEST_VALUES if size == 2 else WIDEST


def product_bytes(*arrays: jax.Array) -> int:
    """Bytes per number in the dtype in which arrays are multiplied (``dtypes.narrow``)."""
    return dtypes.narrow(*(x.dtype for x in arrays)).itemsize


@dataclasses.dataclass(frozen=True)
class MatrixKernels(protocol.Kernels):
    """A family with a ``[K, V]`` state per head by its kernels, whose states are ``[B, H, V, K]``; a run has q, k and v, of
    one dtype. ``chunk``: tokens per chunk, or None."""

    scale: float
    chunk: int | None
    target: Target

    def summarise(self, run: Any) -> tuple[jax.Array, jax.Array]:
        transitions, states = zip(*(super(MatrixKernels, self).summarise(one) for one in _by_values(run)), strict=True)
        return transitions[0], _joined(states)

    def through(self, run: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        pieces = _by_values(run)
        parts = zip(pieces, _split(state, len(pieces)), strict=True)
        o, final = zip(*(super(MatrixKernels, self).through(*part) for part in parts), strict=True)
        return _joined(o), _joined(final)


def _by_values(run: Any) -> list[Any]:
    """The run once for each kernel that shares V."""
    pieces = value_pieces(run.v.shape[-1], product_bytes(run.q, run.k, run.v))
    assert pieces is not None
    return [run._replace(v=v) for v in _split(run.v, pieces)]


def _split(x: jax.Array, pieces: int) -> list[jax.Array]:
    """Along the last axis, V."""
    return jnp.split(x, pieces, axis=-1) if pieces > 1 else [x]


def _joined(parts: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def flat(x: jax.Array) -> jax.Array:
    """``[B, T, H, K]`` to ``[B, T, H K]``, which moves no data."""
    return x.reshape(*x.shape[:2], -1)


def flat_decay(log_decay: jax.Array | None) -> jax.Array | None:
    """One by channel as ``flat``; others as they are."""
    return log_decay if log_decay is None or log_decay.ndim < 4 else flat(log_decay)


def turned(state: jax.Array) -> jax.Array:
    """``[B, H, K, V]`` to ``[B, H, V, K]``, and back."""
    return state.swapaxes(-1, -2)
