"""Solves batches of small unit lower triangular systems by matrix products: row-by-row solvers wait on every row."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.ops import dtypes

_BLOCK = 8  # up to this size, all blocks are worked on in one matrix, masked


@jax.custom_vjp
def solve(lower: jax.Array, right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """X of ``(I + lower) X = R`` for each R of ``right``.

    Args:
      lower: ``[..., c, c]``, zero on the diagonal and above it, float32 or float64.
      right: each ``[..., c, n]``, of the same dtype.

    Returns:
      The X, of the shapes of ``right``.
    """
    return _forward(lower, right)[0]


def _forward(lower, right):
    inverse = _inverse(lower)
    solved = tuple(dtypes.product("...ij,...jn->...in", inverse, r) for r in right)
    return solved, (inverse, solved)


def _backward(residuals, d_solved):
    inverse, solved = residuals
    d_right = tuple(dtypes.product("...ij,...in->...jn", inverse, d) for d in d_solved)
    pairs = zip(d_right, solved, strict=True)
    d_lower = -sum(dtypes.product("...in,...jn->...ij", d, x) for d, x in pairs)
    return jnp.where(_below(np.arange(d_lower.shape[-1]), d_lower), d_lower, jnp.zeros_like(d_lower)), d_right


solve.defvjp(_forward, _backward)


def _inverse(lower: jax.Array) -> jax.Array:
    """``(I + lower)^-1``, from the inverses of its diagonal blocks of 1, 2, 4, ... rows:

    ``inv([[A, 0], [B, C]]) = [[inv(A), 0], [-inv(C) B inv(A), inv(C)]]``. No part of it grows beyond the inverse itself,
    unlike the powers of ``lower`` in a series.
    """
    length = lower.shape[-1]
    padding = max(_BLOCK, 1 << (length - 1).bit_length()) - length
    lower = jnp.pad(lower, ((0, 0),) * (lower.ndim - 2) + ((0, padding),) * 2)
    blocks = _diagonal_blocks(lower, _BLOCK)
    inverse = jnp.broadcast_to(_like(np.eye(_BLOCK), blocks).astype(blocks.dtype), blocks.shape)
    size = 1
    while size < _BLOCK:
        half = np.arange(_BLOCK) // size
        crossing = _like((half[:, None] == half[None] + 1) & (half[None] % 2 == 0), blocks)
        off = _product(inverse, _product(jnp.where(crossing, blocks, jnp.zeros_like(blocks)), inverse))
        inverse, size = inverse - off, 2 * size
    while size < length + padding:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        off = -_product(second, _product(_diagonal_blocks(lower, 2 * size)[..., size:, :size], first))
        upper = jnp.concatenate([first, jnp.zeros_like(off)], axis=-1)
        inverse, size = jnp.concatenate([upper, jnp.concatenate([off, second], axis=-1)], axis=-2), 2 * size
    return inverse[..., 0, :length, :length]


def _product(x, y):
    return dtypes.product("...ij,...jk->...ik", x, y)


def _below(i, like):
    return _like(i[:, None] > i[None], like)


def _like(constant: np.ndarray, like: jax.Array) -> jax.Array:
    """Reshaped to the rank of ``like``."""
    return jnp.asarray(constant).reshape((1,) * (like.ndim - constant.ndim) + constant.shape)


def _diagonal_blocks(x: jax.Array, size: int) -> jax.Array:
    """``[..., c, c]`` -> ``[..., c / size, size, size]``."""
    count = x.shape[-1] // size
    x = x.reshape(*x.shape[:-2], count, size, count, size)
    return jnp.stack([x[..., n, :, n, :] for n in range(count)], axis=-3)
