"""The dtypes in which sums and states are kept, and products that keep to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear.ops import backends


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


def parameter_product(
    equation: str, x: jax.Array, parameter: jax.Array, dtype: jnp.dtype | None = None, *, wide_gradient: bool = True
) -> jax.Array:
    """An einsum of activations and a parameter, which is rounded to the dtype of x; the result is in ``dtype``, by default
    that of x.

    The parameter's gradient is a sum over tokens. With ``wide_gradient`` it stays in the parameter's dtype, and so do the
    sums of it over devices, which XLA puts at this product. Otherwise it is rounded to the dtype of x before these sums,
    which halves their bytes and rounds at each. Every index of the equation is in at least two of its three terms.
    """
    if wide_gradient and x.dtype != narrow(x.dtype, parameter.dtype) == parameter.dtype:
        axes = _varies(x) | _varies(parameter)
        return _parameter_product(equation, dtype, _varying(x, axes), _varying(parameter, axes))
    return _rounded_product(equation, dtype, x, parameter)


def _varies(x):
    """The axes of a ``shard_map`` along which x varies, as far as it is told apart."""
    return jax.typeof(x).manual_axis_type.varying


def _varying(x, axes):
    """Marks x as varying along these axes, so that its gradient is summed over them: JAX does not do this for functions
    with a gradient of their own."""
    missing = tuple(sorted(axes - _varies(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def _rounded_product(equation, dtype, x, parameter):
    return jnp.einsum(equation, x, parameter.astype(x.dtype), preferred_element_type=dtype)


_parameter_product = jax.custom_vjp(_rounded_product, nondiff_argnums=(0, 1))


def _parameter_product_forward(equation, dtype, x, parameter):
    # Not by the function with a custom gradient, in which a remat policy would not see the product.
    return _rounded_product(equation, dtype, x, parameter), (x, parameter)


def _parameter_product_backward(equation, dtype, residuals, dy):
    x, parameter = residuals
    of_inputs, of_y = equation.split("->")
    of_x, of_parameter = of_inputs.split(",")
    d_x = jnp.einsum(f"{of_y},{of_parameter}->{of_x}", dy, parameter.astype(x.dtype).astype(dy.dtype)).astype(x.dtype)
    # XLA for CPUs lacks the transposed product of bfloat16 matrices with a float32 result.
    own = parameter.dtype if backends.platform() == "cpu" else dy.dtype
    d_parameter = jnp.einsum(
        f"{of_x},{of_y}->{of_parameter}", x.astype(own), dy.astype(own), preferred_element_type=parameter.dtype
    )
    return d_x, d_parameter


_parameter_product.defvjp(_parameter_product_forward, _parameter_product_backward)
