"""The dtypes that sums and states are kept in, and the products that keep to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype that holds all of these, and float32 at least: bfloat16 -> float32, float64 -> float64.

    By NumPy's rules, since those of JAX refuse to mix dtypes under ``jax_numpy_dtype_promotion="strict"``.
    """
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two arrays of one dtype, summed in float32 at least; float32 is not cut to fewer bits on any device."""
    out = wide(x.dtype, y.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == out else lax.Precision.DEFAULT
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=out)
