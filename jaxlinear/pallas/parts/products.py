"""Matrix products inside kernels, including numbers with more digits than the matrix unit takes, as sums of terms."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

Terms = tuple[jax.Array, ...]  # of one dtype; each has the digits that those before it leave over


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int], wide) -> jax.Array:
    """The product of two matrices over one axis of each, summed in ``wide``. float32 is not truncated to fewer bits."""
    y = y.astype(x.dtype)
    dimensions = ((over[0],), (over[1],)), ((), ())
    return lax.dot_general(x, y, dimensions, precision=precision(x.dtype, wide), preferred_element_type=wide)


def precision(narrow, wide) -> lax.Precision:
    """The precision of products of ``narrow`` that are summed in ``wide``: all digits. For bfloat16 this is the default,
    the only precision that Mosaic accepts, so it is requested whatever ``jax_default_matmul_precision`` is."""
    return lax.Precision.HIGHEST if narrow == wide else lax.Precision.DEFAULT


def terms(x: jax.Array, narrow, count: int) -> Terms:
    """x (float32 if ``count`` is 2) as one or two terms of dtype ``narrow``: for bfloat16, 8 or 16 digits."""
    if count == 1:
        return (x.astype(narrow),)
    # Rounded through its bits: in interpreted kernels XLA may remove a conversion back and forth.
    bits = lax.bitcast_convert_type(x, jnp.int32)
    high = lax.bitcast_convert_type((bits + jnp.int32(2**15)) & jnp.int32(-(2**16)), x.dtype)
    return high.astype(narrow), (x - high).astype(narrow)


def dot_terms(x: Terms, y: Terms, over: tuple[int, int], wide) -> jax.Array:
    """``dot`` of the sums, without what is below the last digits of either."""
    return functools.reduce(jnp.add, [dot(*pair, over, wide) for pair in pairs(x, y)])


def pairs(x: Terms, y: Terms) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The pairs of terms whose products make up the product of the sums."""
    count = max(len(x), len(y))
    return ((a, b) for i, a in enumerate(x) for j, b in enumerate(y) if i + j < count)
