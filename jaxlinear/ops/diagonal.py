"""Diagonal linear recurrences: h_t = a_t * h_{t-1} + x_t, elementwise, real or complex.

The transition of RG-LRU (Griffin, Hawk), S5, LRU, HGRN and their kin.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear.ops import backends, dtypes, segments


def linear_recurrence(
    a: jax.Array,
    x: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Runs ``h_t = a_t * h_{t-1} + x_t`` over time.

    Args:
      a: ``[B, T, ...]``, or ``[...]`` for a transition that is constant in time. Real or complex.
      x: ``[B, T, ...]``, real or complex.
      initial_state: ``[B, ...]``, the state before the first step (the last one if ``reverse``); None means zero.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id. The initial state belongs to the document
        of the first step taken.
      reverse: run from the last token to the first, ``h_t = a_t * h_{t+1} + x_t``.
      backend: ``"recurrent"`` (a loop over time), ``"associative"`` (a parallel prefix) or ``"auto"``.

    Returns:
      h ``[B, T, ...]`` in the dtype of x (its complex counterpart if ``a`` is complex), and the state after the last
      step ``[B, ...]`` in float32 or complex64 (float64 or complex128 when given those).

    ``auto`` takes the loop on CPU, where each step is a memory pass and the loop makes the fewest, and the parallel
    prefix elsewhere. A single token takes neither.
    """
    backends.check("linear_recurrence", backend, ("recurrent", "associative"))
    a, x = jnp.asarray(a), jnp.asarray(x)
    compute = dtypes.wide(a.dtype, x.dtype)
    out = dtypes.wide(x.dtype, jnp.complex64) if _is_complex(a) and not _is_complex(x) else x.dtype

    a = a.astype(compute)
    if a.ndim < x.ndim:
        a = jnp.broadcast_to(jnp.expand_dims(a, tuple(range(x.ndim - a.ndim))), x.shape)
    if segment_ids is not None:
        boundary = segments.ends(segment_ids) if reverse else segments.starts(segment_ids)
        a = jnp.where(jnp.expand_dims(boundary, tuple(range(2, x.ndim))), jnp.zeros((), compute), a)
    if initial_state is None:
        initial_state = jnp.zeros_like(x, shape=(x.shape[0], *x.shape[2:]), dtype=compute)
    h, final = _recurrence(a, x.astype(compute), initial_state.astype(compute), reverse, _pick(backend))
    return h.astype(out), final


def _is_complex(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def _pick(backend: str) -> str:
    if backend != "auto":
        return backend
    return "recurrent" if jax.default_backend() == "cpu" else "associative"


# The backward pass of a linear recurrence is the same recurrence run the other way:
#     g_t = dh_t + a_{t+1} g_{t+1},   dx_t = g_t,   da_t = g_t h_{t-1},   dh_{-1} = a_0 g_0.
# Written out so that a and h are all that is kept between the passes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _recurrence(a, x, initial_state, reverse, backend):
    first, last = (-1, 0) if reverse else (0, -1)
    x = x.at[:, first].add(a[:, first] * initial_state)
    h = (_associative if backend == "associative" else _recurrent)(a, x, reverse)
    return h, h[:, last]


def _recurrence_forward(a, x, initial_state, reverse, backend):
    h, final = checkpoint_name(_recurrence(a, x, initial_state, reverse, backend), "recurrence")
    return (h, final), (a, h, initial_state)


def _recurrence_backward(reverse, backend, residuals, cotangents):
    a, h, initial_state = residuals
    dh, d_final = cotangents
    first, last = (-1, 0) if reverse else (0, -1)
    dh = dh.at[:, last].add(d_final)
    if backend == "associative":
        g = _associative(_shift(a, jnp.zeros_like(d_final), not reverse), dh, not reverse)
    else:
        g = _recurrent(a, dh, not reverse, lag=1)
    return g * _shift(h, initial_state, reverse), g, a[:, first] * g[:, first]


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _shift(x: jax.Array, fill: jax.Array, reverse: bool) -> jax.Array:
    """``[B, T, ...]``: each step's predecessor in the direction of time, ``fill`` ``[B, ...]`` for the first."""
    fill = fill[:, None]
    return jnp.concatenate([x[:, 1:], fill] if reverse else [fill, x[:, :-1]], axis=1)


def _recurrent(a: jax.Array, x: jax.Array, reverse: bool, lag: int = 0) -> jax.Array:
    """A loop over time from the state ``x[first]``, with the transition of ``lag`` steps before.

    The state is read where the step before wrote it, so that a step is one in-place update and nothing is transposed:
    on CPU it costs little more than an addition of two arrays.
    """
    length = x.shape[1]
    direction = -1 if reverse else 1
    first = length - 1 if reverse else 0

    def at(y: jax.Array, t: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(y, t, axis=1, keepdims=False)

    def step(i: jax.Array, h: jax.Array) -> jax.Array:
        t = first + direction * i
        state = at(a, t - direction * lag) * at(h, t - direction) + at(x, t)
        return lax.dynamic_update_index_in_dim(h, state, t, axis=1)

    return lax.fori_loop(1, length, step, jnp.zeros_like(x).at[:, first].set(x[:, first]))


def _associative(a: jax.Array, x: jax.Array, reverse: bool) -> jax.Array:
    """A parallel prefix over the maps h -> a h + x (Blelloch 1990)."""

    def compose(earlier, later):
        a_earlier, x_earlier = earlier
        a_later, x_later = later
        return a_later * a_earlier, a_later * x_earlier + x_later

    return lax.associative_scan(compose, (a, x), reverse=reverse, axis=1)[1]
