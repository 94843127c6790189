"""Linear attention as a family of recurrences: by chunks of matrix products, and by its kernels."""

import dataclasses
from types import ModuleType
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.ops import decay, dtypes, matrix_states, protocol, state_kernels
from jaxlinear.pallas.linear_attention import kernel as kernels


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
class LinearAttentionKernel(state_kernels.StateKernels, LinearAttentionMaps):
    """The family ``linear_attention.LinearAttention`` by the kernel."""

    KERNELS: ClassVar[ModuleType] = kernels

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> kernels.Inputs:
        q, k, v, log_decay, starts, _ = inputs
        narrow = dtypes.narrow(q.dtype, k.dtype, v.dtype)
        log_decay = log_decay if constants is None else constants
        return kernels.Inputs(q.astype(narrow), k.astype(narrow), v.astype(narrow), log_decay, starts)
