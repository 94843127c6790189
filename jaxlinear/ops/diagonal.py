"""Diagonal linear recurrences: h_t = a_t * h_{t-1} + x_t, elementwise, real or complex.

The transition of RG-LRU (Griffin, Hawk), S5, LRU, HGRN and their kin.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, diagonal_kernel, dtypes, recurrence, segments
from jaxlinear.ops.diagonal_maps import DiagonalMaps, Power, Transition

# Platforms on which a complex recurrence runs as real arithmetic on two arrays: XLA emulates complex numbers on TPU,
# and Pallas kernels have none. Elsewhere complex numbers are native, and the loop over one array is faster.
REAL_ARITHMETIC_ON = ("tpu",)


@calls.recorded
def linear_recurrence(
    a: jax.Array,
    x: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    backend: str = "auto",
    runner: recurrence.Runner = recurrence.WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``h_t = a_t * h_{t-1} + x_t`` over time.

    Args:
      a: ``[B, T, ...]``, or ``[...]`` for a transition that is constant in time. Real or complex. Integers and Python
        numbers take the precision of x.
      x: ``[B, T, ...]``, real or complex.
      initial_state: ``[B, ...]``, the state before the first step (the last one if ``reverse``); None means zero.
      segment_ids: ``[B, T]`` int; the state never crosses a change of id. The initial state belongs to the document
        of the first step taken.
      reverse: run from the last token to the first, ``h_t = a_t * h_{t+1} + x_t``.
      backend: ``"recurrent"`` (a loop over time), ``"associative"`` (a parallel prefix), ``"pallas"`` (a kernel for TPU
        and GPU, interpreted elsewhere) or ``"auto"``.
      runner: how time is spread over devices; on one device by default.

    Returns:
      h ``[B, T, ...]`` in the dtype of x (its complex counterpart if ``a`` is complex), and the state after the last
      step ``[B, ...]`` in float32 or complex64 (float64 or complex128 if a or x is).

    On TPU and GPU ``auto`` uses the kernel or, where it does not run, the parallel prefix, which is logged once. On CPU,
    where each step is a memory pass and the loop makes the fewest, it uses the loop. A single token is one step. Loop and
    prefix run complex numbers as pairs of real ones on the platforms in ``REAL_ARITHMETIC_ON``; values and gradients are
    the same.
    """
    backends.check("linear_recurrence", backend, _BACKENDS)
    a, x = jnp.asarray(a), jnp.asarray(x)
    if a.weak_type or not jnp.issubdtype(a.dtype, jnp.inexact):
        a = _as_precise(a, x)
    initial_state = None if initial_state is None else jnp.asarray(initial_state)
    _check_shapes(a, x, initial_state)
    checks.numbers("linear_recurrence", complex_too=True, x=x)
    segment_ids = checks.segment_ids("linear_recurrence", segment_ids, *x.shape[:2])
    backend = choose(backend, a, x)
    compute = dtypes.wide(a.dtype, x.dtype)
    out = dtypes.wide(x.dtype, jnp.complex64) if _is_complex(a.dtype) and not _is_complex(x.dtype) else x.dtype

    boundary = None
    if segment_ids is not None:
        boundary = segments.ends(segment_ids) if reverse else runner.starts(segment_ids)
    if initial_state is None:
        initial_state = diagonal_kernel.no_state(a, x)
    initial_state = initial_state.astype(compute)
    if x.shape[1] == 0:
        return jnp.zeros_like(x, dtype=out), initial_state
    if runner is not recurrence.WHOLE:
        if reverse:
            raise UserError("linear_recurrence: reverse=True does not run with time spread over several devices")
        constant = jnp.expand_dims(a, tuple(range(x.ndim - 2 - a.ndim))) if a.ndim < x.ndim else None
        inputs = (a if constant is None else None, x, boundary)
        family = diagonal_kernel.DiagonalKernel(target=backends.target()) if backend == "pallas" else Diagonal(backend)
        h, final = runner.run(family, None, inputs, constant, initial_state)
        return h.astype(out), final
    if backend == "pallas":
        a, x = diagonal_kernel.of_one_kind(a, x)
        h, final = diagonal_kernel.scan(a, x, initial_state, boundary, reverse, backends.target())
    else:
        h, final = _run(a, x.astype(compute), initial_state, boundary, reverse, backend)
    return h.astype(out), final


_LOOPS = ("recurrent", "associative")
_BACKENDS = (*_LOOPS, "pallas")


def choose(backend: str, a: jax.Array, x: jax.Array) -> str:
    """The backend that ``linear_recurrence`` uses for these arrays: by its rules if ``backend`` is ``"auto"``."""
    if backend not in ("auto", "pallas"):
        return backend
    if backend == "auto" and (not backends.takes_kernels() or x.shape[1] == 1):
        return "recurrent" if backends.platform() == "cpu" or x.shape[1] == 1 else "associative"
    refusal = functools.partial(diagonal_kernel.refusal, a.dtype, x.dtype, dtypes.wide(a.dtype, x.dtype))
    instead, how = "associative", "as an associative scan"
    runs = backends.kernel_runs("linear_recurrence", backend, [x.shape], refusal, instead=instead, how=how)
    return "pallas" if runs else instead


@dataclasses.dataclass(frozen=True)
class Diagonal(DiagonalMaps):
    """The family (``recurrence.Family``) of these recurrences, for when time is split. Its outputs are h.

    ``inputs`` are ``(a, x, starts)``: a and x ``[B, T, ...]``; ``starts`` ``[B, T]`` bool, true where the state begins anew
    (possibly at the first token), or None if it never does. For a transition that is constant in time, a is None there and
    ``constants`` is a, with the axes of the state except B; M is then a ``Power``, of which only ``kept`` is sent to other
    devices.

    Padding with zeros is not neutral: a = 0 forgets, and a^n counts every token. So the pieces must divide T. On one device
    nothing is split: the loop and the prefix are already linear in T.
    """

    backend: str = "auto"

    def prepare(self, inputs, constants) -> "_Run":
        a, x, starts = inputs
        backends.check("Diagonal", self.backend, _LOOPS)
        constant = a is None
        a = jnp.asarray(constants if constant else a)
        _check_shapes(a, x, None)
        x = x.astype(dtypes.wide(a.dtype, x.dtype))
        h, _ = _run(a, x, jnp.zeros_like(x[:, 0]), starts, False, self.backend)
        # M is computed by itself, not taken as the last of the products below, so that those can wait, or run while the map
        # is in transit.
        # What scales the state before the run is purely a product of transitions: if those are constant, it is the same for
        # all rows until the first document of a row ends.
        if not constant:
            decay, _ = _run(a, jnp.zeros_like(x), jnp.ones_like(x[:, 0]), starts, False, self.backend)
            whole = jnp.prod(_kept(a.astype(x.dtype), None if starts is None else ~starts), axis=1)
            return _Run(h, decay, None, whole)
        decay, _ = _run(a, jnp.zeros_like(x[:1]), jnp.ones_like(x[:1, 0]), None, False, self.backend)
        keep = jnp.ones_like(x, shape=(x.shape[0], 1), dtype=bool)
        if starts is not None:
            keep = jnp.cumsum(starts, axis=1, dtype=jnp.int32) == 0
        power = jnp.broadcast_to(lax.integer_pow(a.astype(x.dtype), x.shape[1]), h[:, -1].shape)
        return _Run(h, decay, keep, Power(keep[:, -1].astype(x.dtype), power))

    def summarise(self, run: "_Run") -> tuple[Transition, jax.Array]:
        return run.whole, run.h[:, -1]

    def apply(self, run: "_Run", state: jax.Array) -> jax.Array:
        """h ``[B, T, ...]`` in float32 or complex64 (float64 or complex128 when given those)."""
        return _kept(run.decay * state[:, None], run.keep) + run.h

    def through(self, run: "_Run", state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The outputs are the states."""
        h = self.apply(run, state)
        return h, h[:, -1]


class _Run(NamedTuple):
    h: jax.Array  # [B, T, ...], from no state
    decay: jax.Array  # [B or 1, T, ...], of the state before the run
    keep: jax.Array | None  # [B, T or 1], false where that state's document has ended; None if the decay varies
    whole: Transition  # M


def _check_shapes(a, x, initial_state) -> None:
    if x.ndim < 2:
        raise UserError(f"linear_recurrence: x is {x.shape}; it must be [B, T, ...]")
    inner = x.shape[2:]
    if a.ndim == x.ndim:
        fits = a.shape == x.shape
    else:
        fits = a.ndim <= len(inner) and all(n in (1, m) for n, m in zip(a.shape[::-1], inner[::-1], strict=False))
    if not fits:
        raise UserError(f"linear_recurrence: a {a.shape} does not fit x {x.shape}; it must be [B, T, ...] or [...]")
    if initial_state is not None and jnp.shape(initial_state) != (x.shape[0], *inner):
        raise UserError(
            f"linear_recurrence: the initial state is {jnp.shape(initial_state)}, not [B, ...] = {(x.shape[0], *inner)}"
        )
    given = a.dtype, x.dtype
    if initial_state is not None and _is_complex(jnp.result_type(initial_state)) and not any(map(_is_complex, given)):
        raise UserError("linear_recurrence: the initial state is complex, a and x are real; make one of them complex")


def _as_precise(a: jax.Array, x: jax.Array) -> jax.Array:
    """A Python number has no precision of its own: as an array it would be float64 where JAX has that."""
    real = jnp.finfo(dtypes.wide(x.dtype)).dtype
    return a.astype(dtypes.wide(real, jnp.complex64) if _is_complex(a.dtype) else real)


def _is_complex(dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _run(a, x, initial_state, boundary, reverse: bool, backend: str):
    """``_recurrence`` of a ``[B, T, ...]`` or ``[...]``, x in the dtype to compute in, forgetting at ``boundary``."""
    if backend == "auto":
        backend = "recurrent" if backends.platform() == "cpu" else "associative"
    pairs = _is_complex(x.dtype) and backends.platform() in REAL_ARITHMETIC_ON
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
    x = x.at[:, first].add(a[:, first] * _kept(initial_state, keep, first))
    h = _steps(a, x, keep, reverse, backend, pairs)
    return h, h[:, last]


def _recurrence_forward(a, x, initial_state, keep, reverse, backend, pairs):
    h, final = recurrence.named(_recurrence(a, x, initial_state, keep, reverse, backend, pairs))
    return (h, final), (a, h, initial_state, keep)


def _recurrence_backward(reverse, backend, pairs, residuals, cotangents):
    a, h, initial_state, keep = residuals
    dh, d_final = cotangents
    first, last = (-1, 0) if reverse else (0, -1)
    dh = dh.at[:, last].add(d_final)
    g = _steps(a, dh, keep, not reverse, backend, pairs, lag=1)
    d_a = g * _kept(_shift(h, initial_state, reverse), keep)
    if a.shape != h.shape:
        d_a = jnp.sum(d_a, axis=(0, 1), keepdims=True)
    return d_a, g, _kept(a[:, first] * g[:, first], keep, first), None


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _steps(a, x, keep, reverse: bool, backend: str, pairs: bool, lag: int = 0) -> jax.Array:
    """h from the state ``x[first]``, using the transition ``lag`` steps earlier. Arrays are passed as tuples: of one array,
    or of the real and the imaginary part."""
    split = (lambda y: (jnp.real(y), jnp.imag(y))) if pairs else lambda y: (y,)
    if backend == "associative":
        a = _kept(jnp.broadcast_to(a, x.shape), keep)
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


def _kept(x: jax.Array, keep: jax.Array | None, at: int | None = None) -> jax.Array:
    """x ``[B, T, ...]``, or ``[B, ...]`` of the step ``at``: zero where it is not kept."""
    if keep is None:
        return x
    return jnp.where(_beside(keep if at is None else keep[:, at], x), x, jnp.zeros((), x.dtype))


def _beside(mask: jax.Array, x: jax.Array) -> jax.Array:
    """The mask with as many axes as x."""
    return jnp.expand_dims(mask, tuple(range(mask.ndim, x.ndim)))
