"""Linear attention: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t.

The recurrence of linear attention, RetNet, Lightning attention, Mamba-2, GLA, HGRN2 and their kin.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import backends, calls, checks, decay, dtypes, linear_attention_kernel, matrix_states, recurrence
from jaxlinear.ops.linear_attention_maps import Inputs, LinearAttentionMaps

_CPU_CHANNEL_CHUNK = 32  # a decay by channel costs more in larger chunks; elsewhere the states matter more


@calls.recorded
def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    runner: recurrence.Runner = recurrence.WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T`` and reads ``o_t = scale * S_t^T q_t``.

    Args:
      q, k: ``[B, T, H, K]``, or ``[B, T, 1, K]`` if all heads share them: kernels take these as they are if the decay is
        not by channel; otherwise they are copied for each head.
      v: ``[B, T, H, V]``.
      log_decay: at most 0. None (1 forever), ``[H]`` (constant in time), ``[B, T, H]`` or ``[B, T, H, K]`` (by key
        channel). -inf forgets.
      initial_state: ``[B, H, K, V]``, the state before the first token, of that token's document; None means zeros.
      scale: of the outputs; ``K**-0.5`` by default.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id.
      chunk_size: tokens per chunk. None is 64 for ``"chunked"``, 32 for a decay by key channel on CPU, or the smallest
        power of two that holds a shorter T; for ``"pallas"`` the size in the kernel's table. Affects only speed,
        memory and rounding.
      backend: ``"recurrent"`` (a loop over time), ``"chunked"`` (matrix products inside chunks), ``"pallas"`` (the same
        as a kernel for TPU and GPU, interpreted elsewhere) or ``"auto"``.
      runner: how time is spread over devices; on one device by default.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v, and the state after the last token ``[B, H, K, V]`` in float32 (float64
      if q, k or v is).

    ``auto`` uses the loop for at most 8 tokens, unless it is given a chunk size, and chunks for more: on TPU and GPU the
    kernel or, where it does not run, plain chunks, which is logged once. Chunks multiply in the dtype that holds those of
    q, k and v; all sums, decays and states are float32 (float64) in every backend.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    matrix_states.check_shapes(
        "linear_attention", q, k, v, log_decay, initial_state, constant_decay=True, may_share=True
    )
    batch, length, _, width = q.shape
    backend, q, k = matrix_states.choose_shared(choose, backend, q, k, v, log_decay, chunk_size, runner)
    chunk = matrix_states.choose_chunk("linear_attention", backend, chunk_size, length, runner)
    wide = dtypes.wide(q.dtype, k.dtype, v.dtype)
    scale = checks.scale("linear_attention", width, scale)
    log_decay = None if log_decay is None else jnp.asarray(log_decay)
    if initial_state is None:
        initial_state = matrix_states.no_state(q, k, v)
    initial_state = jnp.asarray(initial_state).astype(wide)
    segment_ids = checks.segment_ids("linear_attention", segment_ids, batch, length)
    starts = None if segment_ids is None else runner.starts(segment_ids)
    if 0 in v.shape[:3]:
        return jnp.zeros_like(v), initial_state
    if chunk is None and backend != "pallas":
        return _recurrent(q, k, v, log_decay, initial_state, starts, scale)
    keys, values = width, v.shape[3]
    if backend == "pallas":
        more = linear_attention_kernel.padding(q, k, v, backends.target().platform)
        q, k, v, log_decay, initial_state = _padded(q, k, v, log_decay, initial_state, more)
    inputs, constants = Inputs(q, k, v, log_decay, starts, None), None
    if log_decay is not None and log_decay.ndim == 1:
        inputs, constants = inputs._replace(log_decay=None), log_decay.astype(wide)
    if chunk is None:
        family = linear_attention_kernel.LinearAttentionKernel(scale, chunk_size, backends.target())
        o, final = recurrence.in_one_run(family, runner, inputs, constants, initial_state)
    else:
        if constants is not None:
            inputs = inputs._replace(present=jnp.ones((batch, length), bool))
        if chunk_size is None and log_decay is not None and log_decay.ndim == 4 and backends.platform() == "cpu":
            chunk = min(chunk, _CPU_CHANNEL_CHUNK)
        o, final = runner.run(LinearAttention(scale), chunk, inputs, constants, initial_state)
    return o.astype(v.dtype)[..., :values], final[..., :keys, :values]


def _padded(q, k, v, log_decay, state, more: tuple[int, int]):
    """With so many channels of zeros more in K and in V."""

    def last(x, count):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)]) if count else x

    if matrix_states.is_by_channel(log_decay):
        log_decay = last(log_decay, more[0])
    state = last(last(state, more[1]).swapaxes(-1, -2), more[0]).swapaxes(-1, -2)
    return last(q, more[0]), last(k, more[0]), last(v, more[1]), log_decay, state


# ``"pallas"`` if ``linear_attention`` uses the kernel, else the backend as given.
choose = functools.partial(matrix_states.choose, "linear_attention", linear_attention_kernel.refusal)


class _Run(NamedTuple):
    """Arrays by chunk, heads before time: ``[B, H, T, ...]``."""

    inner: jax.Array  # [B, H, T, V], what the tokens read of each other's writes
    queries: jax.Array  # [B, H, T, K], what reads the state before the run
    keys: jax.Array  # [B, H, T, K], decayed to the end of the run
    values: jax.Array
    kept: jax.Array  # [B, H, K or 1], how much of the state before the run remains after it


@dataclasses.dataclass(frozen=True)
class LinearAttention(LinearAttentionMaps):
    """The family (``recurrence.Family``) of these recurrences.

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


def _recurrent(q, k, v, log_decay, initial_state, starts, scale):
    """A loop over time."""
    wide = initial_state.dtype
    decay = jnp.exp(matrix_states.by_channel(log_decay, q.shape, wide))
    if starts is not None:
        decay = jnp.where(starts[:, :, None, None], jnp.zeros((), wide), decay)

    def step(state, xs):
        qt, kt, vt, at = xs
        state = at[..., None] * state + kt[..., None] * vt[:, :, None]
        return state, scale * dtypes.product("bhkv,bhk->bhv", state, qt)

    xs = [jnp.moveaxis(x.astype(wide), 1, 0) for x in (q, k, v, decay)]
    final, o = lax.scan(step, initial_state, xs)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final
