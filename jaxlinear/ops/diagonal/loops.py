"""Diagonal recurrences by XLA: a loop over time or a parallel prefix, with gradients."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import backends, protocol

# Platforms on which a complex recurrence runs as real arithmetic on two arrays: XLA emulates complex numbers on TPU,
# and Pallas kernels have none. Elsewhere complex numbers are native, and the loop over one array is faster.
REAL_ARITHMETIC_ON = ("tpu",)


def is_complex(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def run(a, x, initial_state, boundary, reverse: bool, backend: str):
    """``_recurrence`` of a ``[B, T, ...]`` or ``[...]``, x in the dtype to compute in, forgetting at ``boundary``."""
    if backend == "auto":
        backend = "recurrent" if backends.platform() == "cpu" else "associative"
    pairs = is_complex(x.dtype) and backends.platform() in REAL_ARITHMETIC_ON
    a, keep = a.astype(x.dtype), None
    if a.ndim < x.ndim:
        a = jnp.expand_dims(a, tuple(range(x.ndim - a.ndim)))
        a = jnp.broadcast_to(a, (1, 1, *x.shape[2:]))
        keep = None if boundary is None else ~boundary
    elif boundary is not None:
        a = jnp.where(_beside(boundary, a), jnp.zeros((), a.dtype), a)
    return _recurrence(a, x, initial_state, keep, reverse, backend, pairs)


# The backward pass of a linear recurrence is the same recurrence run the other way:
#     g_t = dh_t + a_{t+1} g_{t+1},   dx_t = g_t,   da_t = g_t h_{t-1},   dh_{-1} = a_0 g_0,
# without conjugates, since JAX's gradient of a real function of x + iy is its derivative by x minus i times that by y. It
# is written out so that only a and h are kept between the passes. A transition that is constant in time is [1, 1, ...] and
# comes with ``keep`` [B, T], which is false where the state before a step is forgotten, or None.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _recurrence(a, x, initial_state, keep, reverse, backend, pairs):
    first, last = (-1, 0) if reverse else (0, -1)
    x = x.at[:, first].add(a[:, first] * kept(initial_state, keep, first))
    h = _steps(a, x, keep, reverse, backend, pairs)
    return h, h[:, last]


def _recurrence_forward(a, x, initial_state, keep, reverse, backend, pairs):
    h, final = protocol.named(_recurrence(a, x, initial_state, keep, reverse, backend, pairs))
    return (h, final), (a, h, initial_state, keep)


def _recurrence_backward(reverse, backend, pairs, residuals, cotangents):
    a, h, initial_state, keep = residuals
    dh, d_final = cotangents
    first, last = (-1, 0) if reverse else (0, -1)
    dh = dh.at[:, last].add(d_final)
    g = _steps(a, dh, keep, not reverse, backend, pairs, lag=1)
    d_a = g * kept(_shift(h, initial_state, reverse), keep)
    if a.shape != h.shape:
        d_a = jnp.sum(d_a, axis=(0, 1), keepdims=True)
    return d_a, g, kept(a[:, first] * g[:, first], keep, first), None


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _steps(a, x, keep, reverse: bool, backend: str, pairs: bool, lag: int = 0) -> jax.Array:
    """h from the state ``x[first]``, using the transition ``lag`` steps earlier. Arrays are passed as tuples: of one array,
    or of the real and the imaginary part."""
    split = (lambda y: (jnp.real(y), jnp.imag(y))) if pairs else lambda y: (y,)
    if backend == "associative":
        a = kept(jnp.broadcast_to(a, x.shape), keep)
        if lag:
            a = _shift(a, jnp.zeros_like(a[:, 0]), reverse)
        h = _associative(split(a), split(x), reverse)
    else:
        h = _recurrent(split(a), split(x), keep, reverse, lag)
    return lax.complex(*h) if pairs else h[0]


def _recurrent(a, x, keep, reverse: bool, lag: int):
    """A loop over time.

    The state is carried from step to step on its own and only written, never read, in h: so a step is an in-place update
    and nothing is transposed. On CPU it costs little more than adding two arrays.
    """
    length = x[0].shape[1]
    direction = -1 if reverse else 1
    first = length - 1 if reverse else 0

    def at(y: jax.Array, t: jax.Array) -> jax.Array:
        return y[:, 0] if y.shape[1] == 1 else lax.dynamic_index_in_dim(y, t, axis=1, keepdims=False)

    def step(i: jax.Array, carry):
        state, h = carry
        t = first + direction * i
        before = t - direction * lag
        if keep is not None:
            state = tuple(jnp.where(_beside(at(keep, before), s), s, jnp.zeros((), s.dtype)) for s in state)
        state = _plus(_times(tuple(at(y, before) for y in a), state), tuple(at(y, t) for y in x))
        h = tuple(lax.dynamic_update_index_in_dim(y, s, t, axis=1) for y, s in zip(h, state, strict=True))
        return state, h

    start = tuple(y[:, first] for y in x)
    h = tuple(jnp.zeros_like(y).at[:, first].set(s) for y, s in zip(x, start, strict=True))
    return lax.fori_loop(1, length, step, (start, h))[1]


def _associative(a, x, reverse: bool):
    """A parallel prefix over the maps h -> a h + x (Blelloch 1990)."""

    def compose(earlier, later):
        a_earlier, x_earlier = earlier
        a_later, x_later = later
        return _times(a_later, a_earlier), _plus(_times(a_later, x_earlier), x_later)

    return lax.associative_scan(compose, (a, x), reverse=reverse, axis=1)[1]


def _times(x, y):
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _plus(x, y):
    return tuple(one + other for one, other in zip(x, y, strict=True))


def _shift(x: jax.Array, fill: jax.Array, reverse: bool) -> jax.Array:
    """``[B, T, ...]``: each step's predecessor in the direction of time, and ``fill`` ``[B, ...]`` for the first step."""
    fill = fill[:, None]
    return jnp.concatenate([x[:, 1:], fill] if reverse else [fill, x[:, :-1]], axis=1)


def kept(x: jax.Array, keep: jax.Array | None, at: int | None = None) -> jax.Array:
    """x ``[B, T, ...]``, or ``[B, ...]`` of the step ``at``: zero where it is not kept."""
    if keep is None:
        return x
    return jnp.where(_beside(keep if at is None else keep[:, at], x), x, jnp.zeros((), x.dtype))


def _beside(mask: jax.Array, x: jax.Array) -> jax.Array:
    """The mask with as many axes as x."""
    return jnp.expand_dims(mask, tuple(range(mask.ndim, x.ndim)))
