"""Products of matrices inside kernels; also of numbers with more digits than the matrix unit takes, as sums of terms."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

Terms = tuple[jax.Array, ...]  # of one dtype; each has the digits that those before it leave


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int], wide) -> jax.Array:
    """The product of two matrices over one axis of each, summed in ``wide``; float32 is not cut to fewer bits."""
    y = y.astype(x.dtype)
    dimensions = ((over[0],), (over[1],)), ((), ())
    return lax.dot_general(x, y, dimensions, precision=precision(x.dtype, wide), preferred_element_type=wide)


def precision(narrow, wide) -> lax.Precision:
    """Of products of ``narrow`` that are summed in ``wide``: all digits. Of bfloat16 these are the default's, and Mosaic
    takes no other, so it is asked for, whatever ``jax_default_matmul_precision`` is."""
    return lax.Precision.HIGHEST if narrow == wide else lax.Precision.DEFAULT


def terms(x: jax.Array, narrow, count: int) -> Terms:
    """x, which is float32 where ``count`` is 2, in one or two terms of dtype ``narrow``: of bfloat16 8 or 16 digits."""
    if count == 1:
        return (x.astype(narrow),)
    # Rounded by its bits: where a kernel is interpreted, XLA may take a conversion forth and back for none.
    bits = lax.bitcast_convert_type(x, jnp.int32)
    high = lax.bitcast_convert_type((bits + jnp.int32(2**15)) & jnp.int32(-(2**16)), x.dtype)
    return high.astype(narrow), (x - high).astype(narrow)


def dot_terms(x: Terms, y: Terms, over: tuple[int, int], wide) -> jax.Array:
    """``dot`` of the sums, but for what is below the last digits of either."""
    return functools.reduce(jnp.add, [dot(*pair, over, wide) for pair in pairs(x, y)])


def pairs(x: Terms, y: Terms) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Of terms, whose products that of the sums is made of."""
    count = max(len(x), len(y))
    return ((a, b) for i, a in enumerate(x) for j, b in enumerate(y) if i + j < count)
