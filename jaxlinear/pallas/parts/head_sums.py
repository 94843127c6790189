"""Sums of heads' log decays within chunks. They are small beside keys and values, so they are taken outside the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear.pallas.parts import chunk_decays


def coarse_and_fine(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[..., c]`` to the sums up to each token, ``[..., c]`` twice: two parts, for ``chunk_decays.by_sums``.

    Each log decay is split into a whole multiple of a common unit and a small rest. The multiples are summed exactly, so
    the differences of their sums are exact as well.
    """
    coarse, fine = chunk_decays.coarse_and_fine(chunk_decays.finite(log_decay), log_decay.shape[-1])
    return _sums(np.tri(log_decay.shape[-1]), coarse), _sums(np.tri(log_decay.shape[-1]), fine)


def from_last(x: jax.Array) -> jax.Array:
    """``y_i = sum_{j >= i} x_j`` of ``[..., c]``."""
    return _sums(np.tri(x.shape[-1]).T, x)


def _sums(chosen: np.ndarray, x: jax.Array) -> jax.Array:
    return jnp.einsum("...j,ij->...i", x, jnp.asarray(chosen, x.dtype), precision=lax.Precision.HIGHEST)
