"""Numbers inside kernels: a tuple of one real array, or of the real and the imaginary part of a complex one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Parts = tuple[Any, ...]


def split(x: jax.Array) -> Parts:
    return (jnp.real(x), jnp.imag(x)) if jnp.issubdtype(x.dtype, jnp.complexfloating) else (x,)


def join(x: Parts) -> jax.Array:
    return lax.complex(*x) if len(x) == 2 else x[0]


def one(like: Parts) -> Parts:
    return tuple(jnp.full_like(y, 1 if i == 0 else 0) for i, y in enumerate(like))


def zero(like: Parts) -> Parts:
    return tuple(jnp.zeros_like(y) for y in like)


def times(x: Parts, y: Parts) -> Parts:
    if len(x) == 1:
        return (x[0] * y[0],)
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def plus(x: Parts, y: Parts) -> Parts:
    return tuple(a + b for a, b in zip(x, y, strict=True))


def where(condition: jax.Array, x: Parts, y: Parts) -> Parts:
    return tuple(jnp.where(condition, a, b) for a, b in zip(x, y, strict=True))
