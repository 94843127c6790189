"""Decays within a chunk: sums of their logarithms between any two tokens, and products of tokens decayed by them.

Axes: any leading ones, then time within the chunk c, then D: the key channels K, or 1 for a decay of the whole head. G_i
is the sum of the log decays of tokens 0 .. i. What token i sees of token j < i is decayed by exp(G_i - G_j).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear.ops import dtypes

# Blocks of this many tokens take their products channel by channel, which beats ever smaller matrix products.
_DIRECT = 4


class Sums(NamedTuple):
    """G in two parts, each ``[..., c, D]``: G_i - G_j is the difference of the coarse parts plus that of the fine ones.

    A difference of plain float32 sums would lose what is small to what is large: after a log decay of -50, the sum no
    longer tells -1e-7 from 0. The coarse parts are whole multiples of one unit, so that their sums and differences are
    exact; the fine parts are small.
    """

    coarse: jax.Array
    fine: jax.Array


def sums(log_decay: jax.Array) -> Sums:
    """G of log decays ``[..., c, D]``, at most 0, float32 or float64. -inf is a decay to zero."""
    bits = jnp.finfo(log_decay.dtype)
    floor = 128.0 if bits.bits == 32 else 1024.0  # the exponential of what is below is zero
    length = log_decay.shape[-2]
    unit = 2.0 ** np.ceil(np.log2(floor * length / 2 ** (bits.nmant + 1)))
    log_decay = jnp.maximum(log_decay, -floor)
    coarse = lax.stop_gradient(jnp.ceil(log_decay / unit) * unit)
    until = jnp.tri(length, dtype=log_decay.dtype)
    return Sums(*(dtypes.product("ij,...jd->...id", until, part) for part in (coarse, log_decay - coarse)))


def since_start(sums: Sums) -> jax.Array:
    """exp(G_i) ``[..., c, D]``: what token i sees of the state before the chunk."""
    return jnp.exp(sums.coarse + sums.fine)


def until_end(sums: Sums) -> jax.Array:
    """``[..., c, D]``: what the state after the chunk holds of token j."""
    return jnp.exp(_difference(Sums(*(part[..., -1:, :] for part in sums)), sums))


def whole(sums: Sums) -> jax.Array:
    """``[..., D]``: what the state after the chunk holds of the state before it."""
    return since_start(Sums(*(part[..., -1, :] for part in sums)))


def pairwise(rows: jax.Array, columns: jax.Array, sums: Sums | None) -> jax.Array:
    """``A_ij = sum_k rows_ik columns_jk exp(G_ik - G_jk)`` for i >= j, zero elsewhere.

    Args:
      rows, columns: ``[..., c, K]``, multiplied in their dtype.
      sums: None for no decay.

    Returns:
      A ``[..., c, c]``, float32 at least.
    """
    length = rows.shape[-2]
    if sums is not None and sums.fine.shape[-1] > 1:
        return _by_halves(rows, columns, sums)
    products = dtypes.product("...ik,...jk->...ij", rows, columns)
    if sums is not None:
        steps = _difference(*(Sums(*(jnp.expand_dims(p[..., 0], axis) for p in sums)) for axis in (-1, -2)))
        products = products * jnp.exp(jnp.where(_lower(length, steps.ndim, strict=True), steps, jnp.zeros_like(steps)))
    return jnp.where(_lower(length, products.ndim), products, jnp.zeros_like(products))


def _by_halves(rows, columns, sums: Sums) -> jax.Array:
    """A decay of each channel is no factor of the products: it must be within them, on the rows and on the columns.

    In a block of tokens cut in half, what the second half sees of the first goes through the last token r of the first:
    exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j), both at most 1. The halves are blocks in their turn.
    """
    length = rows.shape[-2]
    padding = (1 << (length - 1).bit_length()) - length  # to a power of two, with tokens of zeros and no decay
    if padding:
        rows, columns = (_pad(x, padding, "constant") for x in (rows, columns))
        sums = Sums(*(_pad(part, padding, "edge") for part in sums))
    size = min(_DIRECT, length + padding)
    products = _direct(*(_blocks(x, size) for x in (rows, columns)), Sums(*(_blocks(part, size) for part in sums)))
    while size < length + padding:
        first, second = (Sums(*(_blocks(part, 2 * size)[..., i, :] for part in sums)) for i in _halves(size))
        last = Sums(*(part[..., -1:, :] for part in first))
        lower = dtypes.product(
            "...ik,...jk->...ij",
            _scaled(_blocks(rows, 2 * size)[..., size:, :], _difference(second, last)),
            _scaled(_blocks(columns, 2 * size)[..., :size, :], _difference(last, first)),
        )
        products = products.reshape(*lower.shape[:-2], 2, size, size)
        upper = jnp.concatenate([products[..., 0, :, :], jnp.zeros_like(lower)], axis=-1)
        lower = jnp.concatenate([lower, products[..., 1, :, :]], axis=-1)
        products = jnp.concatenate([upper, lower], axis=-2)
        size *= 2
    return products[..., 0, :length, :length]


def _direct(rows, columns, sums: Sums) -> jax.Array:
    """``pairwise`` with every triple (i, j, k) written out."""
    steps = _difference(*(Sums(*(jnp.expand_dims(p, axis) for p in sums)) for axis in (-2, -3)))
    strict, lower = (_lower(rows.shape[-2], steps.ndim - 1, strict=strict) for strict in (True, False))
    decay = jnp.exp(jnp.where(strict[..., None], steps, jnp.zeros_like(steps)))
    products = jnp.expand_dims(rows, -2).astype(decay.dtype) * jnp.expand_dims(columns, -3).astype(decay.dtype) * decay
    products = jnp.sum(products, axis=-1)
    return jnp.where(lower, products, jnp.zeros_like(products))


def _scaled(x, log_scale):
    return (x.astype(log_scale.dtype) * jnp.exp(log_scale)).astype(x.dtype)


def _difference(later: Sums, earlier: Sums) -> jax.Array:
    return (later.coarse - earlier.coarse) + (later.fine - earlier.fine)


def _lower(length: int, ndim: int, strict: bool = False) -> jax.Array:
    """True where i >= j (i > j if strict): ``[1, ..., 1, c, c]``."""
    return jnp.tri(length, k=-1 if strict else 0, dtype=bool).reshape((1,) * (ndim - 2) + (length, length))


def _halves(size: int) -> tuple[slice, slice]:
    return slice(None, size), slice(size, None)


def _blocks(x, size: int):
    """``[..., c, D]`` -> ``[..., c / size, size, D]``."""
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def _pad(x, amount: int, mode: str):
    return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, amount), (0, 0)), mode=mode)
