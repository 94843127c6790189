"""The dtypes in which sums and states are kept, and products that keep to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype that holds all of these, and float32 at least: bfloat16 -> float32, float64 -> float64.

    By NumPy's rules: JAX's refuse to mix dtypes under ``jax_numpy_dtype_promotion="strict"``.
    """
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def narrow(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype that holds all of these, in which they are multiplied: bfloat16 -> bfloat16."""
    return functools.reduce(np.promote_types, dtypes)


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum of two arrays of one dtype, summed in float32 at least; no device reduces the precision of float32.

    The gradients of narrower arrays are likewise products of narrow arrays.
    """
    if x.dtype == wide(x.dtype, y.dtype):
        return jnp.einsum(equation, x, y, precision=lax.Precision.HIGHEST)
    return _narrow_product(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=wide(x.dtype, y.dtype))


def _narrow_forward(equation, x, y):
    return _narrow_product(equation, x, y), (x, y)


def _narrow_backward(equation, residuals, d_product):
    # The gradient of a float32 result is float32, and a product with it would be a float32 product.
    _, pullback = jax.vjp(functools.partial(jnp.einsum, equation), *residuals)
    return pullback(d_product.astype(residuals[0].dtype))


_narrow_product.defvjp(_narrow_forward, _narrow_backward)
