"""Linear attention as a family of recurrences: by chunks of matrix products, and by its kernels."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.ops import decay, dtypes, matrix_states, protocol
from jaxlinear.ops.matrix_states import flat, turned
from jaxlinear.pallas.linear_attention import gpu, tpu
from jaxlinear.pallas.linear_attention.plan import Arguments, Plan


class Inputs(NamedTuple):
    """The inputs of a run, arrays ``[B, T, ...]``."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None  # [B, T, H] or [B, T, H, K]
    starts: jax.Array | None  # [B, T] bool, true where a document, and with it the state, begins
    present: jax.Array | None  # [B, T] bool, given with a constant decay: false for padding, which must not decay


@dataclasses.dataclass(frozen=True)
class LinearAttentionMaps(protocol.Family):
    """The part of the family that concerns maps. M is diagonal: a summary is ``(kept [B, H, K or 1], C [B, H, K, V])``."""

    def compose(self, earlier, later) -> tuple[jax.Array, jax.Array]:
        return later[0] * earlier[0], self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        return summary[0][..., None] * state + summary[1]


class _Run(NamedTuple):
    """Arrays by chunk, heads before time: ``[B, H, T, ...]``."""

    inner: jax.Array  # [B, H, T, V], what the tokens read of each other's writes
    queries: jax.Array  # [B, H, T, K], what reads the state before the run
    keys: jax.Array  # [B, H, T, K], decayed to the end of the run
    values: jax.Array
    kept: jax.Array  # [B, H, K or 1], how much of the state before the run remains after it


@dataclasses.dataclass(frozen=True)
class LinearAttention(LinearAttentionMaps):
    """The family (``protocol.Family``) of these recurrences.

    ``inputs`` are ``Inputs``; ``constants`` is None or a log decay ``[H]`` that is constant in time.
    """

    scale: float

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> _Run:
        wide = dtypes.wide(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
        narrow = dtypes.narrow(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
        q, k, v = (x.swapaxes(1, 2).astype(narrow) for x in inputs[:3])
        log_decay = inputs.log_decay
        if constants is not None:
            assert inputs.present is not None
            log_decay = jnp.where(inputs.present[..., None], constants[None, None], jnp.zeros((), constants.dtype))
        decays = matrix_states.decays_of_run(log_decay, inputs.starts, q, wide)
        (attention,) = decay.pairwise((q,), k, decays.log_decay)
        attention = decays.within_documents(attention).astype(narrow)
        inner = dtypes.product("...ij,...jv->...iv", attention, v)
        queries, keys = decay.scaled(q, decays.since_start), decay.scaled(k, decays.until_end)
        return _Run(inner, queries, keys, v, decays.kept)

    def summarise(self, run: _Run) -> tuple[jax.Array, jax.Array]:
        return run.kept, dtypes.product("...tk,...tv->...kv", run.keys, run.values)

    def apply(self, run: _Run, state: jax.Array) -> jax.Array:
        """o ``[B, T, H, V]`` in the dtype of the products."""
        outer = dtypes.product("...tk,...kv->...tv", run.queries, state.astype(run.queries.dtype))
        return (self.scale * (run.inner + outer)).astype(run.values.dtype).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class LinearAttentionKernel(matrix_states.MatrixKernels, LinearAttentionMaps):
    """The family ``LinearAttention`` by the kernels. On TPU one works within and between chunks and keeps the state
    resident; on GPU there is one for the states and one for all chunks. With no decay or one per head, q and k shared by
    all heads may be ``[B, T, 1, K]``."""

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> Inputs:
        q, k, v, log_decay, starts, _ = inputs
        narrow = dtypes.narrow(q.dtype, k.dtype, v.dtype)
        log_decay = log_decay if constants is None else constants
        return Inputs(q.astype(narrow), k.astype(narrow), v.astype(narrow), log_decay, starts, None)

    def forward(self, run: Inputs, state: jax.Array, *, keep: bool):
        """``before``: before each block of time or, on GPU, before each chunk."""
        arguments = self._arguments(run, state)._replace(queries=flat(run.q))
        o, *before, final = self._call("forward", run, arguments, keep=keep)
        return o.reshape(run.v.shape), turned(final), before[0] if keep else None

    def summary(self, run: Inputs) -> tuple[jax.Array, jax.Array]:
        batch, _, heads, values = run.v.shape
        none = jnp.zeros((batch, heads, run.k.shape[-1], values), dtypes.wide(run.q.dtype))
        *kept, final = self._call("summary", run, self._arguments(run, none))
        return (kept[0][:, :, 0] if kept else _kept(run, none.dtype)), turned(final)

    def gradient(self, run: Inputs, before: jax.Array, d_outputs: jax.Array, d_final: jax.Array):
        q, k, v, log_decay, *_ = run
        arguments = self._arguments(run, d_final)._replace(queries=flat(q), d_o=flat(d_outputs), before=before)
        d_q, d_k, d_v, *d_log_decay, d_state = self._call("gradient", run, arguments)
        of_decay = None if log_decay is None else d_log_decay[0].reshape(log_decay.shape).astype(log_decay.dtype)
        d_run = Inputs(d_q.reshape(q.shape), d_k.reshape(k.shape), d_v.reshape(v.shape), of_decay, None, None)
        return d_run, turned(d_state)

    def state_gradient(self, run: Inputs, d_outputs: jax.Array, d_final: jax.Array) -> jax.Array:
        arguments = self._arguments(run, d_final)._replace(keys=flat(run.q), values=flat(d_outputs))
        return turned(self._call("state_gradient", run, arguments)[0])

    def _arguments(self, run: Inputs, state: jax.Array) -> Arguments:
        log_decay = matrix_states.flat_decay(run.log_decay)
        return Arguments(flat(run.k), flat(run.v), turned(state), log_decay=log_decay, starts=run.starts)

    def _call(self, kind: str, run: Inputs, arguments: Arguments, *, keep: bool = False) -> list[jax.Array]:
        _, k, v, log_decay, starts, _ = run
        plan = Plan(
            kind,
            heads=v.shape[2],
            key_width=k.shape[3],
            value_width=v.shape[3],
            decay={0: "none", 1: "constant", 3: "scalar", 4: "channel"}[0 if log_decay is None else log_decay.ndim],
            packed=starts is not None,
            scale=self.scale,
            chunk=self.chunk,
            keep=keep,
            shared=matrix_states.is_shared(k, v),
            length=k.shape[1],
            narrow=k.dtype,
            wide=arguments.state.dtype,
        )
        return (gpu if self.target.platform == "gpu" else tpu).call(plan, arguments, self.target)


def _kept(run: Inputs, dtype: jnp.dtype) -> jax.Array:
    """The share of the state that remains ``[B, H, K or 1]``, from the log decays alone."""
    batch, length, heads, _ = run.v.shape
    total = jnp.zeros((batch, heads, 1), dtype)
    if run.log_decay is not None and run.log_decay.ndim == 1:
        total = total + (run.log_decay.astype(dtype) * jnp.asarray(length, dtype))[None, :, None]
    elif run.log_decay is not None:
        summed = jnp.sum(run.log_decay.astype(dtype), axis=1)
        total = summed if summed.ndim == 3 else summed[..., None]
    kept = jnp.exp(total)
    if run.starts is not None:
        kept = jnp.where(jnp.any(run.starts, axis=1)[:, None, None], jnp.zeros_like(kept), kept)
    return kept
