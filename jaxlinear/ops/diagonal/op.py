"""Diagonal linear recurrences: h_t = a_t * h_{t-1} + x_t, elementwise, real or complex.

The transition of RG-LRU (Griffin, Hawk), S5, LRU, HGRN and their kin.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, protocol, segments
from jaxlinear.ops.backends import Form
from jaxlinear.ops.diagonal import loops
from jaxlinear.ops.diagonal.family import Diagonal, DiagonalKernel, no_state
from jaxlinear.ops.spec import TIME, Arrays, Axes, Spec


@calls.recorded
def linear_recurrence(
    a: jax.Array,
    x: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    backend: str = "auto",
    time: protocol.TimeAxis = protocol.UNSHARDED,
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
      time: where the time axis lies; on one device by default.

    Returns:
      h ``[B, T, ...]`` in the dtype of x (its complex counterpart if ``a`` is complex), and the state after the last
      step ``[B, ...]`` in float32 or complex64 (float64 or complex128 if a or x is).

    On TPU and GPU ``auto`` uses the kernel or, where it does not run, the parallel prefix, which is logged once. On CPU,
    where each step is a memory pass and the loop makes the fewest, it uses the loop. A single token is one step. Loop and
    prefix run complex numbers as pairs of real ones on the platforms in ``REAL_ARITHMETIC_ON``; values and gradients are
    the same.
    """
    a, x = jnp.asarray(a), jnp.asarray(x)
    if a.weak_type or not jnp.issubdtype(a.dtype, jnp.inexact):
        a = _as_precise(a, x)
    initial_state = None if initial_state is None else jnp.asarray(initial_state)
    _check_shapes(a, x, initial_state)
    checks.numbers("linear_recurrence", complex_too=True, x=x)
    segment_ids = checks.segment_ids("linear_recurrence", segment_ids, *x.shape[:2])
    form = choose(a, x, backend=backend)
    compute = dtypes.wide(a.dtype, x.dtype)
    out = (
        dtypes.wide(x.dtype, jnp.complex64) if loops.is_complex(a.dtype) and not loops.is_complex(x.dtype) else x.dtype
    )

    boundary = None
    if segment_ids is not None:
        boundary = segments.ends(segment_ids) if reverse else time.starts(segment_ids)
    if initial_state is None:
        initial_state = no_state(a, x)
    initial_state = initial_state.astype(compute)
    if x.shape[1] == 0:
        return jnp.zeros_like(x, dtype=out), initial_state
    if time is not protocol.UNSHARDED:
        if reverse:
            raise UserError("linear_recurrence: reverse=True does not run with time sharded over several devices")
        constant = jnp.expand_dims(a, tuple(range(x.ndim - 2 - a.ndim))) if a.ndim < x.ndim else None
        inputs = (a if constant is None else None, x, boundary)
        family = DiagonalKernel(target=backends.target()) if form.is_kernel else Diagonal(form.name)
        h, final = time.run(family, None, inputs, constant, initial_state)
        return h.astype(out), final
    if form.is_kernel:
        kernel = DiagonalKernel(backends.target(), reverse)
        h, final = kernel.through(kernel.prepare((a, x, boundary), None), initial_state)
    else:
        h, final = loops.run(a, x.astype(compute), initial_state, boundary, reverse, form.name)
    return h.astype(out), final


def choose(a: Any, x: Any, *, backend: str | Form = "auto", **_: Any) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    few = "recurrent" if x.shape[1] == 1 or (backends.platform() == "cpu" and backend == "auto") else None
    refused = functools.partial(refusal, a.dtype, x.dtype, dtypes.wide(a.dtype, x.dtype))
    forms = "recurrent", "associative", "pallas"
    shapes = (x.shape,)
    plain = "associative"
    return backends.choose("linear_recurrence", backend, forms, plain=plain, few=few, shapes=shapes, refusal=refused)


def _axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    rank, of_a = jnp.ndim(arrays["x"]), jnp.ndim(arrays["a"])
    inner = (axis, *(None,) * rank)[: rank - 2]
    constant = inner[len(inner) - of_a :] if of_a < rank else None
    return {
        "a": (*TIME, *inner) if constant is None else constant,
        "x": (*TIME, *inner),
        "initial_state": ("batch", *inner),
        "segment_ids": TIME,
    }


def _complete(arrays: Arrays, form: Form) -> Arrays:
    if "initial_state" in arrays or not form.is_kernel:
        return arrays
    return arrays | {"initial_state": no_state(arrays["a"], arrays["x"])}


def _as_precise(a: jax.Array, x: jax.Array) -> jax.Array:
    """A Python number has no precision of its own: as an array it would be float64 where JAX has that."""
    real = jnp.finfo(dtypes.wide(x.dtype)).dtype
    return a.astype(dtypes.wide(real, jnp.complex64) if loops.is_complex(a.dtype) else real)


def refusal(a_dtype, x_dtype, compute_dtype, platform: str) -> str | None:
    """Why the kernels do not run, or None. Where they are interpreted rather than compiled, nothing is refused."""
    if platform not in backends.COMPILED:
        return None
    if compute_dtype not in (np.dtype(np.float32), np.dtype(np.complex64)):
        return f"the kernel computes in float32 or complex64, not in {compute_dtype}"
    allowed = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.complex64))
    for dtype in (a_dtype, x_dtype):
        if dtype not in allowed:
            return f"the kernel takes float32, bfloat16 and complex64, not {dtype}"
    return None


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
    if (
        initial_state is not None
        and loops.is_complex(jnp.result_type(initial_state))
        and not any(map(loops.is_complex, given))
    ):
        raise UserError("linear_recurrence: the initial state is complex, a and x are real; make one of them complex")


LINEAR_RECURRENCE = Spec(
    linear_recurrence,
    choose,
    _axes,
    results=("x", "initial_state"),
    axis="recurrent",
    plain="associative",
    over_time="recurrence",
    complete=_complete,
)
