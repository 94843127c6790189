"""Decays within a chunk: of one token as seen by another, and products of tokens weighted by these decays.

A log decay is ``[..., c, D]``, float32 or float64, at most 0 and possibly -inf: any leading axes, then the c tokens of
the chunk; D = K for a decay per key channel and D = 1 for one per head. Token i sees token j < i decayed by
exp(G_i - G_j), where the difference is the sum of the log decays of j + 1 .. i. That sum must not be taken as the
difference of two longer ones: after a log decay of -50 they no longer distinguish -1e-7 from 0. Every exponential here is
of a sum of exactly the log decays it covers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear.ops import dtypes
from jaxlinear.pallas.parts.chunk_decays import floor

_BLOCK = 8  # tokens; smaller matrix products are no faster


def since_start(log_decay: jax.Array) -> jax.Array:
    """``[..., c, D]``: the decay of the state before the chunk, as seen by token i."""
    return _ends(log_decay)[0]


def until_end(log_decay: jax.Array) -> jax.Array:
    """``[..., c, D]``: the decay of token j in the state after the chunk."""
    return _ends(log_decay)[1]


def whole(log_decay: jax.Array) -> jax.Array:
    """``[..., D]``: the decay of the state before the chunk in the state after it."""
    return jnp.exp(jnp.sum(log_decay, axis=-2))


def pairwise(rows: tuple[jax.Array, ...], columns: jax.Array, log_decay: jax.Array | None) -> tuple[jax.Array, ...]:
    """``A_ij = sum_k r_ik columns_jk exp(G_ik - G_jk)`` for i >= j, zero elsewhere, for each r of ``rows``.

    Args:
      rows: each ``[..., c, K]``, multiplied in its own dtype. All of them share the work on the columns.
      columns: ``[..., c, K]``.
      log_decay: ``[..., c, D]``, or None for no decay.

    Returns:
      A ``[..., c, c]`` for each r, float32 at least.
    """
    if log_decay is not None and log_decay.shape[-1] > 1:
        length = columns.shape[-2]
        padded = [_pad(x, -length % _BLOCK) for x in (*rows, columns, log_decay)]
        products = _by_channel(tuple(padded[:-2]), padded[-2], _finite(padded[-1]))
        return tuple(x[..., :length, :length] for x in products)
    products = tuple(dtypes.product("...ik,...jk->...ij", r, columns.astype(r.dtype)) for r in rows)
    if log_decay is None:
        return tuple(jnp.where(_lower(x), x, jnp.zeros_like(x)) for x in products)
    decays = _matrix(_finite(log_decay))
    return tuple(x * decays for x in products)


def scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    """``x * factor``, multiplied in the dtype of the factor and rounded to that of x; x itself without a factor."""
    return x if factor is None else (x.astype(factor.dtype) * factor).astype(x.dtype)


@jax.custom_vjp
def _ends(log_decay):
    """``since_start`` and ``until_end``."""
    length = log_decay.shape[-2]
    log_decay = _finite(log_decay)
    if log_decay.shape[-1] == 1:
        return jnp.exp(_sums(np.tri(length), log_decay)), jnp.exp(_sums(np.tri(length, k=-1).T, log_decay))
    factors = _factors(_pad(log_decay, -length % _BLOCK))
    ends = factors.seen * factors.before, factors.left * factors.after
    return tuple(x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :length, :] for x in ends)


def _ends_forward(log_decay):
    ends = _ends(log_decay)
    return ends, ends


def _ends_backward(ends, cotangents):
    since_start, until_end = (end * d for end, d in zip(ends, cotangents, strict=True))
    length = since_start.shape[-2]
    # A token's log decay affects what it and later tokens see, and what earlier tokens leave.
    return (_sums(np.tri(length).T, since_start) + _sums(np.tri(length, k=-1), until_end),)


_ends.defvjp(_ends_forward, _ends_backward)


# A decay per head is a factor of the products: one matrix of decays.


def _matrix(log_decay):
    """exp(G_i - G_j) for i >= j, zero elsewhere: ``[..., c, c]``.

    Each log decay is split into a whole multiple of one unit and a small remainder. The multiples are summed exactly,
    so the differences of their sums are exact too.
    """
    bits, length = jnp.finfo(log_decay.dtype), log_decay.shape[-2]
    unit = 2.0 ** math.ceil(math.log2(-floor(log_decay.dtype) * length / 2 ** (bits.nmant + 1)))
    coarse = lax.stop_gradient(jnp.ceil(log_decay / unit) * unit)
    coarse, fine = (_sums(np.tri(length), part) for part in (coarse, log_decay - coarse))
    steps = (coarse - jnp.swapaxes(coarse, -1, -2)) + (fine - jnp.swapaxes(fine, -1, -2))
    # The diagonal is 1 whatever the decay. Left out here, it adds no gradient terms that would have to cancel.
    decays = jnp.exp(jnp.where(_lower(steps, strict=True), steps, jnp.zeros_like(steps)))
    return jnp.where(_lower(steps), decays, jnp.zeros_like(decays))


# A decay per channel goes inside the products, on their rows and columns. Tokens of different blocks meet at the start
# of the later block; tokens of one block meet at the middle of the smallest of its halves, quarters, ... that contains
# both:
#     exp(G_i - G_j) = exp(G_i - G_r) exp(G_r - G_j),   i > r >= j,
# so both factors are at most 1. The product for tokens on the same side of r is meaningless and is masked.


class _Factors(NamedTuple):
    """N blocks of S tokens. ``seen`` is the decay from a block's start to a token, ``left`` from the token to its end."""

    parts: tuple[tuple[int, jax.Array, jax.Array], ...]  # for parts of 1, 2, ... S / 2 tokens: size, seen, left
    seen: jax.Array  # [..., N, S, K]
    left: jax.Array  # [..., N, S, K]
    between: jax.Array  # [..., N, N, 1, K], from the end of the second block to the start of the first, or zero
    before: jax.Array  # [..., N, 1, K], from the start of the chunk to that of the block
    after: jax.Array  # [..., N, 1, K], from the end of the block to that of the chunk


def _factors(log_decay) -> _Factors:
    log_decay = _blocks(log_decay)
    count = log_decay.shape[-3]
    i, j, m = np.ogrid[:count, :count, :count]
    pairs = ((j < m) & (m < i)).reshape(-1, count)
    chosen = np.concatenate([pairs, m[0] < i[:, :, 0], m[0] > i[:, :, 0]])
    of_blocks = jnp.exp(_sums(chosen, jnp.sum(log_decay, axis=-2)))[..., None, :]
    between, before, after = jnp.split(of_blocks, [len(pairs), len(pairs) + count], axis=-3)
    between = between.reshape(*between.shape[:-3], count, count, *between.shape[-2:])
    between = jnp.where(_like(i[..., None] > j[..., None], between), between, jnp.zeros_like(between))
    of_tokens = jnp.exp(_sums(np.concatenate([np.tri(_BLOCK), np.tri(_BLOCK, k=-1).T]), log_decay))
    seen, left = jnp.split(of_tokens, 2, axis=-2)
    return _Factors(_parts(log_decay), seen, left, between, before, after)


def _parts(log_decay):
    """Products of two to four decays, which are cheaper to multiply than to sum and exponentiate."""
    seen, left = jnp.exp(log_decay), jnp.ones_like(log_decay)
    parts, size = [(1, seen, left)], 1
    while 2 * size < _BLOCK:
        first, second = (x.reshape(*x.shape[:-2], -1, 2 * size, x.shape[-1]) for x in (seen, left))
        in_second = _like((np.arange(2 * size) >= size)[:, None], first)
        one = jnp.ones_like(first[..., :1, :])
        grown = first * jnp.where(in_second, first[..., size - 1 : size, :], one)
        left = (second * jnp.where(in_second, one, first[..., -1:, :])).reshape(seen.shape)
        seen, size = grown.reshape(seen.shape), 2 * size
        parts.append((size, seen, left))
    return tuple(parts)


@jax.custom_vjp
def _by_channel(rows, columns, log_decay):
    factors = _factors(log_decay)
    columns = _blocks(columns)
    count = columns.shape[-3]
    far_columns = _far(columns, factors)
    near, same = _crossings(columns), _like(np.eye(_BLOCK, dtype=bool), columns)
    products = []
    for r in map(_blocks, rows):
        far = dtypes.product("...ik,...jk->...ij", scaled(r, factors.seen), far_columns.astype(r.dtype))
        block = dtypes.product("...ik,...jk->...ij", r, columns.astype(r.dtype))
        block = jnp.where(same, block, jnp.zeros_like(block))
        for crossing, (_, seen, left) in zip(near, factors.parts, strict=True):
            both = scaled(r, seen), scaled(columns, left).astype(r.dtype)
            block = jnp.where(crossing, dtypes.product("...ik,...jk->...ij", *both), block)
        far = far.reshape(*far.shape[:-1], count, _BLOCK)
        own = _like(np.eye(count, dtype=bool)[:, None, :, None], far)
        product = jnp.where(own, block[..., None, :], far)
        products.append(product.reshape(*product.shape[:-4], count * _BLOCK, count * _BLOCK))
    return tuple(products)


def _by_channel_forward(rows, columns, log_decay):
    return _by_channel(rows, columns, log_decay), (rows, columns, log_decay)


def _by_channel_backward(residuals, cotangents):
    all_rows, all_columns, log_decay = residuals
    factors = _factors(log_decay)
    columns = _blocks(all_columns)
    count = columns.shape[-3]
    far_columns = _far(columns, factors)
    near = _crossings(columns)
    # Only the products of different tokens: that of a token with itself has no decay.
    d_rows, d_far, d_near = [], 0.0, [0.0] * len(near)
    for r, d in zip(map(_blocks, all_rows), cotangents, strict=True):
        d = d.reshape(*d.shape[:-2], count, _BLOCK, count, _BLOCK).astype(r.dtype)
        block = jnp.stack([d[..., n, :, n, :] for n in range(count)], axis=-3)
        d = d.reshape(*d.shape[:-2], count * _BLOCK)
        d_row = factors.seen * dtypes.product("...ij,...jk->...ik", d, far_columns.astype(r.dtype))
        d_far = d_far + dtypes.product("...ij,...ik->...jk", d, scaled(r, factors.seen))
        for n, (crossing, (_, seen, left)) in enumerate(zip(near, factors.parts, strict=True)):
            down = jnp.where(crossing, block, jnp.zeros_like(block))
            # Transposed before it is masked: a product that contracts the rows of both is slow when they are few.
            across = jnp.swapaxes(block, -1, -2)
            across = jnp.where(jnp.swapaxes(crossing, -1, -2), across, jnp.zeros_like(across))
            d_row = d_row + seen * dtypes.product("...ij,...jk->...ik", down, scaled(columns, left).astype(r.dtype))
            d_near[n] = d_near[n] + dtypes.product("...ji,...ik->...jk", across, scaled(r, seen))
        d_rows.append(d_row.reshape(all_columns.shape))
    d_far = d_far.reshape(*columns.shape[:-2], *columns.shape[-3:])
    d_columns = factors.left * sum(
        (factors.between[..., n, :, :, :] * d_far[..., n, :, :, :] for n in range(1, count)),
        start=jnp.zeros_like(factors.left),
    )
    d_columns = d_columns + sum(left * d for d, (_, _, left) in zip(d_near, factors.parts, strict=True))
    d_columns = d_columns.reshape(all_columns.shape)
    # A product contains G of its row and -G of its column; a token's log decay is in the G of that and all later
    # tokens.
    wide_rows, wide_columns = [r.astype(log_decay.dtype) for r in all_rows], all_columns.astype(log_decay.dtype)
    d_sums = sum(r * d for r, d in zip(wide_rows, d_rows, strict=True)) - wide_columns * d_columns
    d_log_decay = _sums(np.tri(log_decay.shape[-2]).T, d_sums)
    same = [jnp.diagonal(d, axis1=-2, axis2=-1)[..., None] for d in cotangents]
    d_rows = tuple(
        (d + d_same * wide_columns).astype(r.dtype) for r, d, d_same in zip(all_rows, d_rows, same, strict=True)
    )
    d_columns = d_columns + sum(d_same * r for r, d_same in zip(wide_rows, same, strict=True))
    return d_rows, d_columns.astype(all_columns.dtype), d_log_decay


_by_channel.defvjp(_by_channel_forward, _by_channel_backward)


def _far(columns, factors: _Factors):
    """The columns of all blocks as each block sees them at its start: ``[..., N, c, K]``."""
    seen = scaled(scaled(columns, factors.left)[..., None, :, :, :], factors.between)
    return seen.reshape(*seen.shape[:-3], -1, seen.shape[-1])


def _crossings(like):
    """For parts of 1, 2, ... S / 2 tokens ``[S, S]`` bool: i in the second of two parts, j in the first."""
    part = [np.arange(_BLOCK) >> n for n in range(_BLOCK.bit_length() - 1)]
    return [_like((p[:, None] == p[None] + 1) & (p[None] % 2 == 0), like) for p in part]


def _sums(chosen: np.ndarray, x):
    """``sum_j chosen_ij x_j`` over the last axis but one, in full precision."""
    matrix = jnp.asarray(chosen, x.dtype)
    if x.shape[-1] == 1:
        return dtypes.product("...j,ij->...i", x[..., 0], matrix)[..., None]
    # One copy per index of the leading axes, so that XLA does not transpose x to multiply them all at once.
    return dtypes.product("...ij,...jd->...id", jnp.broadcast_to(_like(matrix, x), (*x.shape[:-2], *matrix.shape)), x)


def _finite(log_decay):
    """Raises log decays to a floor whose exponential is already zero: -inf cannot be summed."""
    return jnp.maximum(log_decay, floor(log_decay.dtype))


def _lower(like, strict: bool = False) -> jax.Array:
    """True where i >= j (i > j if strict)."""
    return _like(np.tri(like.shape[-1], k=-1 if strict else 0, dtype=bool), like)


def _like(constant, like) -> jax.Array:
    """Reshaped to the rank of ``like``."""
    return jnp.asarray(constant).reshape((1,) * (like.ndim - constant.ndim) + constant.shape)


def _blocks(x):
    """``[..., c, D]`` -> ``[..., N, S, D]``."""
    return x.reshape(*x.shape[:-2], -1, _BLOCK, x.shape[-1])


def _pad(x, amount: int):
    """Appends tokens of zeros, which decay nothing."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, amount), (0, 0))) if amount else x
