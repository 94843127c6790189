"""The delta rule: S' = diag(exp(log_decay_t)) S_{t-1},  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = scale S_t^T q_t.

The recurrence of DeltaNet, Gated DeltaNet and Kimi Delta Attention: it replaces what the state holds at a key, whereas
linear attention adds to it. In DeltaProduct (Siems et al. 2025, arXiv:2502.10297) a token does so several times.
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
    decay,
    delta_rule_kernel,
    dtypes,
    matrix_states,
    recurrence,
    triangular,
)
from jaxlinear.ops.delta_rule_maps import DeltaRuleMaps, Inputs

_CHANNEL_CHUNK = 32  # the cost of a decay by channel within a chunk grows with the chunk's size


@calls.recorded
def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    negative_eigenvalues: bool = False,
    runner: recurrence.Runner = recurrence.WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`` with ``S' = diag(exp(log_decay_t)) S_{t-1}``.

    A token may make J updates, each applied to the result of the one before; the state decays before the first and is
    read after the last.

    Args:
      q: ``[B, T, H, K]``.
      k: the same, or ``[B, T, H, J, K]``; used as given: the caller normalises it.
      v: ``[B, T, H, V]`` or ``[B, T, H, J, V]``.
      beta: ``[B, T, H]`` or ``[B, T, H, J]``, how much of what the state holds at k is replaced by v: from 0 to 1 for a
        k of unit length, or to 2 with ``negative_eigenvalues``. Where beta |k|^2 exceeds 2, as it may for a unit vector
        rounded to bfloat16, the state can grow without bound.
      log_decay: at most 0. None (1 forever), ``[B, T, H]`` or ``[B, T, H, K]`` (by key channel). -inf forgets.
      initial_state: ``[B, H, K, V]``, the state before the first token, of that token's document; None means zeros.
      scale: of the outputs ``o_t = scale * S_t^T q_t``; ``K**-0.5`` by default.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id.
      chunk_size: updates per chunk, rounded down to whole tokens, but to one token at least. None is 64 for
        ``"chunked"``, 32 for a decay by key channel, or the smallest power of two that holds fewer updates; for
        ``"pallas"`` the size in the kernel's table. Affects only speed, memory and rounding.
      backend: ``"recurrent"`` (a loop over time), ``"chunked"`` (matrix products inside chunks), ``"pallas"`` (the same
        as a kernel for TPU and GPU, interpreted on CPU) or ``"auto"``.
      negative_eigenvalues: whether beta |k|^2 exceeds 1, where a transition reverses what the state holds at k. The
        bfloat16 kernels then keep twice the digits in some products; otherwise their error is unbounded where keys are
        alike. Changes nothing else.
      runner: how time is spread over devices; on one device by default.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v, and the state after the last token ``[B, H, K, V]`` in float32 (float64
      if q, k or v is).

    ``auto`` uses the loop for at most 8 updates, unless it is given a chunk size, and chunks for more: on TPU and GPU
    the kernel or, where it does not run, plain chunks, which is logged once. Sums, decays and states are float32
    (float64) in every backend, and products of chunks are in the dtype that holds those of q, k and v. The exception is
    the solution for what the tokens of a chunk replace of each other: it is float32 in ``"chunked"``; in the kernel, if
    the products are in bfloat16, it is 8 bits wide, or 16 with ``negative_eigenvalues``.
    """
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    updates = _check_updates(k, v, beta)
    one = _of_one_update(k), _of_one_update(v)
    matrix_states.check_shapes("delta_rule", q, *one, log_decay, initial_state, constant_decay=False, may_share=False)
    batch, length, _, width = q.shape
    if beta.shape != (*q.shape[:3], *k.shape[3:-1]):
        raise UserError(f"delta_rule: beta {beta.shape} does not fit queries {q.shape}; it must be [B, T, H]")
    checks.real("delta_rule", beta=beta)
    by_channel = matrix_states.is_by_channel(log_decay)
    backend = choose(
        backend, q, k, v, chunk_size, runner, by_channel=by_channel, negative_eigenvalues=negative_eigenvalues
    )
    chunk = matrix_states.choose_chunk("delta_rule", backend, chunk_size, length * updates, runner)
    wide = dtypes.wide(q.dtype, k.dtype, v.dtype)
    scale = checks.scale("delta_rule", width, scale)
    log_decay = None if log_decay is None else jnp.asarray(log_decay)
    if initial_state is None:
        initial_state = matrix_states.no_state(q, k, v)
    initial_state = jnp.asarray(initial_state).astype(wide)
    segment_ids = checks.segment_ids("delta_rule", segment_ids, batch, length)
    starts = None if segment_ids is None else runner.starts(segment_ids)
    if 0 in q.shape[:3]:
        return jnp.zeros_like(v, shape=(*q.shape[:3], v.shape[-1])), initial_state
    inputs = Inputs(q, k, v, beta, log_decay, starts)
    if backend == "pallas":
        # A token of the kernels makes one update and reads the state after it; of a token's J reads the last is used.
        family = delta_rule_kernel.DeltaRuleKernel(scale, chunk_size, backends.target(), negative_eigenvalues)
        o, final = recurrence.in_one_run(family, runner, inputs.by_update(), None, initial_state)
        o = o if updates == 1 else o.reshape(batch, length, updates, *o.shape[2:])[:, :, -1]
        return o.astype(v.dtype), final
    if chunk is None:
        return _recurrent(q, k, v, beta, log_decay, initial_state, starts, scale)
    if chunk_size is None and log_decay is not None and log_decay.ndim == 4:
        chunk = min(chunk, _CHANNEL_CHUNK)
    o, final = runner.run(DeltaRule(scale), max(1, chunk // updates), inputs, None, initial_state)
    return o.astype(v.dtype), final


def choose(
    backend: str,
    q: Any,
    k: jax.Array,
    v: jax.Array,
    *arguments: Any,
    negative_eigenvalues: bool = False,
    **options: Any,
) -> str:
    """``matrix_states.choose``: ``"pallas"`` if ``delta_rule`` uses the kernel, else the backend as given."""
    refusal = functools.partial(delta_rule_kernel.refusal, negative_eigenvalues=negative_eigenvalues)
    if k.ndim == 5:
        q = jax.ShapeDtypeStruct((q.shape[0], q.shape[1] * k.shape[3], *q.shape[2:]), q.dtype)
    k, v = _of_one_update(k), _of_one_update(v)
    return matrix_states.choose("delta_rule", refusal, backend, q, k, v, *arguments, **options)


def _check_updates(k: jax.Array, v: jax.Array, beta: jax.Array) -> int:
    """J. Raises ``UserError`` unless keys, values and beta have the same number of updates."""
    if k.ndim != 5:
        return 1
    updates = k.shape[3]
    if not updates or (v.ndim, *v.shape[3:4], *beta.shape[3:]) != (5, updates, updates):
        raise UserError(
            f"delta_rule: keys {k.shape}, values {v.shape} and beta {beta.shape} differ in the number of updates per "
            "token; they must be [B, T, H, J, K], [B, T, H, J, V] and [B, T, H, J]"
        )
    return updates


def _of_one_update(x: jax.Array) -> Any:
    """The shape and dtype of keys or values without the axis of updates."""
    return jax.ShapeDtypeStruct((*x.shape[:3], x.shape[4]), x.dtype) if x.ndim == 5 else x


class _Run(NamedTuple):
    """Arrays by chunk, heads before time. For the state S before the run, the run writes U - W S at its keys. It makes
    T J updates, J per token."""

    attention: jax.Array  # [B, H, T, T J], what the tokens read of each other's writes
    queries: jax.Array  # [B, H, T, K], what reads the state before the run
    keys: jax.Array  # [B, H, T J, K], decayed to the end of the run
    u: jax.Array  # [B, H, T J, V]
    w: jax.Array  # [B, H, T J, K]
    kept: jax.Array  # [B, H, K or 1], how much of the state before the run remains after it


@dataclasses.dataclass(frozen=True)
class DeltaRule(DeltaRuleMaps):
    """The family (``recurrence.Family``) of these recurrences, in its WY form (Yang et al., arXiv:2406.06484).

    What token i writes at its key, x_i = beta_i (v_i - S'^T k_i), depends on the state before the run and on earlier
    writes:

        x_i + beta_i sum_{j<i} (k_i^T diag(exp(G_i - G_j)) k_j) x_j = beta_i v_i - beta_i S^T (exp(G_i) k_i),

    a triangular system whose solution is linear in S: X = U - W S. Decays are as in arXiv:2412.06464 (by head) and
    arXiv:2510.26692 (by channel). ``constants`` is None.
    """

    scale: float

    def prepare(self, inputs: Inputs, constants: None) -> _Run:
        wide = dtypes.wide(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
        narrow = dtypes.narrow(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
        updates, inputs = inputs.updates, inputs.by_update()
        q, k, v = (x.swapaxes(1, 2) for x in inputs[:3])
        q, k, v = q.astype(narrow), k.astype(wide), v.astype(wide)
        beta = inputs.beta.swapaxes(1, 2).astype(wide)[..., None]
        decays = matrix_states.decays_of_run(inputs.log_decay, inputs.starts, k, wide)
        attention, overlap = decay.pairwise((q, k), k, decays.log_decay)
        attention = decays.within_documents(attention)
        overlap = decays.within_documents(beta * jnp.tril(overlap, -1))
        u, w = triangular.solve(overlap, (beta * v, beta * decay.scaled(k, decays.since_start)))
        queries, keys = decay.scaled(q, decays.since_start), decay.scaled(k, decays.until_end)
        if updates > 1:  # the others have no query
            attention, queries = (x[..., updates - 1 :: updates, :] for x in (attention, queries))
        attention, keys, u, w = (x.astype(narrow) for x in (attention, keys, u, w))
        return _Run(attention, queries, keys, u, w, decays.kept)

    def summarise(self, run: _Run) -> tuple[jax.Array, jax.Array]:
        kept = run.kept[..., None] * jnp.eye(run.keys.shape[-1], dtype=run.kept.dtype)[None, None]
        replaced = dtypes.product("...tk,...tl->...kl", run.keys, run.w)
        return kept - replaced, dtypes.product("...tk,...tv->...kv", run.keys, run.u)

    def apply(self, run: _Run, state: jax.Array) -> jax.Array:
        """o ``[B, T, H, V]`` in the dtype of the products."""
        return self._read(run, state, self._written(run, state))

    def through(self, run: _Run, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Avoids M, whose gradient takes two more matrix products."""
        written = self._written(run, state)
        after = run.kept[..., None] * state + dtypes.product("...tk,...tv->...kv", run.keys, written)
        return self._read(run, state, written), after

    def _written(self, run: _Run, state: jax.Array) -> jax.Array:
        """U - W S: what the tokens write at their keys."""
        replaced = dtypes.product("...tk,...kv->...tv", run.w, state.astype(run.w.dtype))
        return (run.u.astype(replaced.dtype) - replaced).astype(run.u.dtype)

    def _read(self, run: _Run, state: jax.Array, written: jax.Array) -> jax.Array:
        inner = dtypes.product("...ij,...jv->...iv", run.attention, written)
        outer = dtypes.product("...tk,...kv->...tv", run.queries, state.astype(run.queries.dtype))
        return (self.scale * (inner + outer)).astype(written.dtype).swapaxes(1, 2)


def _recurrent(q, k, v, beta, log_decay, initial_state, starts, scale):
    """A loop over time."""
    wide = initial_state.dtype
    decay = jnp.exp(matrix_states.by_channel(log_decay, q.shape, wide))
    if starts is not None:
        decay = jnp.where(starts[:, :, None, None], jnp.zeros((), wide), decay)

    def update(state, kt, vt, bt):
        # The barrier keeps XLA for GPUs from computing this sum where it writes the state. The state could then not be
        # updated in place and would be copied in every step.
        new = lax.optimization_barrier(bt[..., None] * (vt - dtypes.product("bhkv,bhk->bhv", state, kt)))
        return state + kt[..., None] * new[:, :, None]

    def step(state, xs):
        qt, *given, at = xs
        state = at[..., None] * state
        each = [given] if beta.ndim == 3 else [[x[:, :, j] for x in given] for j in range(beta.shape[3])]
        for one in each:
            state = update(state, *one)
        return state, scale * dtypes.product("bhkv,bhk->bhv", state, qt)

    xs = [jnp.moveaxis(x.astype(wide), 1, 0) for x in (q, k, v, beta, decay)]
    final, o = lax.scan(step, initial_state, xs)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final
