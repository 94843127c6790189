"""Linear attention: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,  o_t = scale S_t^T q_t.

The recurrence of linear attention, RetNet, Lightning attention, Mamba-2, GLA, HGRN2 and their kin.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, dtypes, segments


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
) -> tuple[jax.Array, jax.Array]:
    """Runs ``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T`` and reads ``o_t = scale * S_t^T q_t``.

    Args:
      q, k: ``[B, T, H, K]``.
      v: ``[B, T, H, V]``.
      log_decay: at most 0. None (1 forever), ``[H]`` (constant in time), ``[B, T, H]`` or ``[B, T, H, K]`` (by key
        channel).
      initial_state: ``[B, H, K, V]``, the state before the first token, of its document; None means zeros.
      scale: of the outputs; ``K**-0.5`` by default.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id.
      chunk_size: tokens in a chunk of the ``"chunked"`` backend, which chooses by itself if None. Changes nothing but
        speed, memory and rounding.
      backend: ``"recurrent"`` (a loop over time), ``"chunked"`` (matrix products inside chunks) or ``"auto"``.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v, and the state after the last token ``[B, H, K, V]`` in float32 (float64
      when given that).
    """
    backends.check("linear_attention", backend, ("recurrent",))
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_shapes("linear_attention", q, k, v, log_decay, initial_state, constant_decay=True)
    batch, _, heads, width = q.shape
    wide = dtypes.wide(q.dtype, k.dtype, v.dtype)
    scale = width**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros_like(q, shape=(batch, heads, width, v.shape[-1]), dtype=wide)
    starts = None if segment_ids is None else segments.starts(jnp.asarray(segment_ids))
    return _recurrent(q, k, v, log_decay, initial_state.astype(wide), starts, scale)


def check_shapes(operation, q, k, v, log_decay, initial_state, *, constant_decay: bool) -> None:
    """Raises ``UserError`` for shapes that do not fit each other."""
    batch, length, heads, width = q.shape
    fitting = {(batch, length, heads), (batch, length, heads, width)} | ({(heads,)} if constant_decay else set())
    if k.shape != q.shape:
        raise UserError(f"{operation}: keys {k.shape} are not of the shape of the queries {q.shape}")
    if v.shape[:3] != q.shape[:3] or v.ndim != 4:
        raise UserError(f"{operation}: values {v.shape} do not fit queries {q.shape}; they are [B, T, H, V]")
    if log_decay is not None and jnp.shape(log_decay) not in fitting:
        names = " or ".join((["[H]"] if constant_decay else []) + ["[B, T, H]", "[B, T, H, K]"])
        raise UserError(f"{operation}: log_decay {jnp.shape(log_decay)} does not fit queries {q.shape}; it is {names}")
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


def _recurrent(q, k, v, log_decay, initial_state, starts, scale):
    """A loop over time."""
    wide = initial_state.dtype
    decay = jnp.exp(by_channel(log_decay, q.shape, wide))
    if starts is not None:
        decay = jnp.where(starts[:, :, None, None], jnp.zeros((), wide), decay)

    def step(state, xs):
        qt, kt, vt, at = xs
        state = at[..., None] * state + kt[..., None] * vt[:, :, None]
        return state, scale * jnp.einsum("bhkv,bhk->bhv", state, qt)

    xs = [jnp.moveaxis(x.astype(wide), 1, 0) for x in (q, k, v, decay)]
    final, o = lax.scan(step, initial_state, xs)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), final
