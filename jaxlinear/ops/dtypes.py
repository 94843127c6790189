"""The dtypes that sums and states are kept in."""

import functools

import jax.numpy as jnp
import numpy as np


def wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype that holds all of these, and float32 at least: bfloat16 -> float32, float64 -> float64.

    By NumPy's rules, since those of JAX refuse to mix dtypes under ``jax_numpy_dtype_promotion="strict"``.
    """
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))
