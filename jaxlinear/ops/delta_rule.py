"""The delta rule: S' = diag(exp(log_decay_t)) S_{t-1},  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = scale S_t^T q_t.

The recurrence of DeltaNet, Gated DeltaNet and Kimi Delta Attention: what the state holds at a key is replaced, not added to.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, decay, dtypes, recurrence, segments
from jaxlinear.ops.linear_attention import by_channel, check_shapes


_FEW_TOKENS = 8
_INVERTED_WHOLE = 8


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
) -> tuple[jax.Array, jax.Array]:
    """Runs ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`` with ``S' = diag(exp(log_decay_t)) S_{t-1}``.

    Args:
      q, k: ``[B, T, H, K]``; k is used as given: the caller normalises it.
      v: ``[B, T, H, V]``.
      beta: ``[B, T, H]``, how much of what the state holds at k is replaced by v.
      log_decay: at most 0. None (1 forever), ``[B, T, H]`` or ``[B, T, H, K]`` (by key channel).
      initial_state: ``[B, H, K, V]``, the state before the first token, of its document; None means zeros.
      scale: of the outputs ``o_t = scale * S_t^T q_t``; ``K**-0.5`` by default.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id.
      chunk_size: tokens in a chunk of the ``"chunked"`` backend, which chooses by itself if None. Changes nothing but
        speed, memory and rounding.
      backend: ``"recurrent"`` (a loop over time), ``"chunked"`` (matrix products inside chunks) or ``"auto"``.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v, and the state after the last token ``[B, H, K, V]`` in float32 (float64
      when given that).
    """
    backends.check("delta_rule", backend, ("recurrent", "chunked"))
    q, k, v, beta = (jnp.asarray(x) for x in (q, k, v, beta))
    check_shapes("delta_rule", q, k, v, log_decay, initial_state, constant_decay=False)
    batch, _, heads, width = q.shape
    if beta.shape != q.shape[:3]:
        raise UserError(f"delta_rule: beta {beta.shape} does not fit queries {q.shape}; it is [B, T, H]")
    wide = dtypes.wide(q.dtype, k.dtype, v.dtype)
    scale = width**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros_like(q, shape=(batch, heads, width, v.shape[-1]), dtype=wide)
    starts = None if segment_ids is None else segments.starts(jnp.asarray(segment_ids))
    if _pick(backend, q.shape[1]) == "recurrent":
        return _recurrent(q, k, v, beta, log_decay, initial_state.astype(wide), starts, scale)
    inputs = Inputs(q, k, v, beta, log_decay, starts)
    chunk = _default_chunk(q.shape[1]) if chunk_size is None else chunk_size
    o, final = recurrence.chunked(DeltaRule(scale), chunk, inputs, None, initial_state.astype(wide))
    return o, final


def _pick(backend, length):
    if backend != "auto":
        return backend
    return "recurrent" if length <= _FEW_TOKENS else "chunked"


def _default_chunk(length):
    return 64


def _recurrent(q, k, v, beta, log_decay, initial_state, starts, scale):
    """A loop over time."""
    wide = initial_state.dtype
    decay = jnp.exp(by_channel(log_decay, q.shape, wide))
    if starts is not None:
        decay = jnp.where(starts[:, :, None, None], jnp.zeros((), wide), decay)

    def step(state, xs):
        qt, kt, vt, bt, at = xs
        state = at[..., None] * state
        new = bt[..., None] * (vt - jnp.einsum("bhkv,bhk->bhv", state, kt))
        state = state + kt[..., None] * new[:, :, None]
        return state, scale * jnp.einsum("bhkv,bhk->bhv", state, qt)

    xs = [jnp.moveaxis(x.astype(wide), 1, 0) for x in (q, k, v, beta, decay)]
    final, o = lax.scan(step, initial_state, xs)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    log_decay: jax.Array | None
    starts: jax.Array | None


class Run(NamedTuple):
    attention: jax.Array
    new: jax.Array
    seen: jax.Array
    queries: jax.Array
    tail: jax.Array
    kept: jax.Array


@dataclasses.dataclass(frozen=True)
class DeltaRule:
    scale: float

    def prepare(self, inputs: Inputs, constants: None) -> Run:
        q, k, v = (jnp.moveaxis(x, 1, 2) for x in inputs[:3])
        wide = dtypes.wide(q.dtype, k.dtype, v.dtype)
        q, k, v = q.astype(wide), k.astype(wide), v.astype(wide)
        beta = jnp.moveaxis(inputs.beta, 1, 2)[..., None].astype(wide)
        length, width = k.shape[-2:]
        q = q * jnp.asarray(self.scale, q.dtype)
        sums = None
        entering, leaving, kept = k, k, jnp.ones_like(k, shape=(*k.shape[:2], width), dtype=wide)
        queries = q
        if inputs.log_decay is not None:
            log_decay = jnp.moveaxis(inputs.log_decay, 1, 2).astype(wide)
            log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
            sums = decay.sums(log_decay)
            start = decay.since_start(sums)
            entering, queries = k * start, q * start
            leaving = k * decay.until_end(sums)
            kept = kept * decay.whole(sums)
        attention = decay.pairwise(q, k, sums)
        overlap = jnp.tril(decay.pairwise(k, k, sums), -1) * beta
        if inputs.starts is not None:
            run = jnp.cumsum(inputs.starts, axis=1, dtype=jnp.int32)[:, None]
            same = run[..., :, None] == run[..., None, :]
            zero = jnp.zeros((), wide)
            attention, overlap = jnp.where(same, attention, zero), jnp.where(same, overlap, zero)
            entering, queries = (jnp.where(run[..., None] == 0, x, zero) for x in (entering, queries))
            leaving = jnp.where(run[..., None] == run[..., -1:, None], leaving, zero)
            kept = jnp.where(run[..., -1:] == 0, kept, zero)
        solved = _solve(overlap, beta * jnp.concatenate([v, entering], axis=-1))
        return Run(attention, solved[..., : v.shape[-1]], solved[..., v.shape[-1] :], queries, leaving, kept)

    def summarise(self, run: Run):
        lost = dtypes.product("nhck,nhcl->nhkl", run.tail, run.seen)
        return jnp.eye(lost.shape[-1], dtype=lost.dtype)[None, None] * run.kept[..., None] - lost, dtypes.product(
            "nhck,nhcv->nhkv", run.tail, run.new
        )

    def compose(self, earlier, later):
        return self.product(later[0], earlier[0]), self.advance(later, earlier[1])

    def advance(self, summary, state):
        return dtypes.product("...kl,...lv->...kv", summary[0], state) + summary[1]

    def apply(self, run: Run, state):
        new = run.new - dtypes.product("nhck,nhkv->nhcv", run.seen, state)
        o = dtypes.product("nhck,nhkv->nhcv", run.queries, state) + dtypes.product(
            "nhcd,nhdv->nhcv", run.attention, new
        )
        return jnp.moveaxis(o, 2, 1)


@jax.custom_vjp
def _solve(lower, right):
    return _solve_forward(lower, right)[0]


def _solve_forward(lower, right):
    inverse = _inverse(lower)
    solved = dtypes.product("...ij,...jv->...iv", inverse, right)
    return solved, (inverse, solved)


def _solve_backward(residuals, d_solved):
    inverse, solved = residuals
    d_right = dtypes.product("...ji,...jv->...iv", inverse, d_solved)
    return -dtypes.product("...iv,...jv->...ij", d_right, solved), d_right


_solve.defvjp(_solve_forward, _solve_backward)


def _inverse(lower):
    length = lower.shape[-1]
    size = max(_INVERTED_WHOLE, 1 << (length - 1).bit_length())
    lower = jnp.pad(lower, ((0, 0),) * (lower.ndim - 2) + ((0, size - length),) * 2)
    blocks = _diagonal_blocks(lower, _INVERTED_WHOLE)
    i = np.arange(_INVERTED_WHOLE)
    inverse = jnp.broadcast_to(jnp.eye(_INVERTED_WHOLE, dtype=lower.dtype), blocks.shape)
    b = 1
    while b < _INVERTED_WHOLE:
        off = (i[:, None] // (2 * b) == i[None] // (2 * b)) & (i[:, None] // b > i[None] // b)
        part = blocks * jnp.asarray(off, lower.dtype)[None, None, None]
        inverse = inverse - (part if b == 1 else inverse @ (part @ inverse))
        b *= 2
    while b < size:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        off = _diagonal_blocks(lower, 2 * b)[..., b:, :b]
        off = -second @ (off @ first)
        inverse = jnp.concatenate(
            [jnp.concatenate([first, jnp.zeros_like(off)], -1), jnp.concatenate([off, second], -1)], -2
        )
        b *= 2
    return inverse[..., 0, :length, :length]


def _diagonal_blocks(x, size):
    count = x.shape[-1] // size
    x = x.reshape(*x.shape[:-2], count, size, count, size)
    return jnp.stack([x[..., i, :, i, :] for i in range(count)], axis=-3)
