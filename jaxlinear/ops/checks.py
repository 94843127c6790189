"""Argument checks, made before operations run: JAX would silently broadcast, truncate or round such arguments."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError


def numbers(operation: str, *, complex_too: bool = False, **arrays: jax.Array) -> None:
    """Raises ``UserError`` for arrays whose dtype the outputs cannot have: integers would truncate them."""
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.inexact if complex_too else jnp.floating):
            kinds = "real or complex" if complex_too else "real"
            raise UserError(
                f"{operation}: {name} has dtype {x.dtype}; it must be {kinds}, such as {name}.astype('float32')"
            )


def real(operation: str, **arrays: Any) -> None:
    """Raises ``UserError`` for complex arrays, whose imaginary parts would be dropped. None is skipped."""
    for name, x in arrays.items():
        if x is not None and jnp.iscomplexobj(x):
            raise UserError(
                f"{operation}: {name} is complex; of the recurrences only linear_recurrence takes complex numbers"
            )


def axes(operation: str, names: str, **arrays: jax.Array) -> None:
    """Raises ``UserError`` for arrays without exactly the axes of ``names``, such as ``"B T H K"``."""
    for name, x in arrays.items():
        if x.ndim != len(names.split()):
            raise UserError(f"{operation}: {name} is {x.shape}; it must be [{', '.join(names.split())}]")


def segment_ids(operation: str, ids: Any, batch: int, length: int) -> jax.Array | None:
    """The ids as an array, or None. Raises ``UserError`` unless there is one per token."""
    if ids is None:
        return None
    ids = jnp.asarray(ids)
    if ids.shape != (batch, length):
        raise UserError(f"{operation}: segment_ids {ids.shape} must be one per token, [B, T] = {(batch, length)}")
    return ids


def scale(operation: str, width: int, given: Any) -> float:
    """``given``, or by default ``K**-0.5`` for K = ``width``. Raises ``UserError`` if K is 0, or if ``given`` is not a
    number when the program is traced: the scale is a constant of the program and has no gradient."""
    if not width:
        raise UserError(f"{operation}: queries and keys have no channels (K is 0)")
    if given is None:
        return float(width**-0.5)
    try:
        return float(given)
    except (TypeError, ValueError):
        raise UserError(
            f"{operation}: scale is {given}; it must be one number, known at trace time (multiply the queries by a "
            "scale that is learned or varies)"
        ) from None
