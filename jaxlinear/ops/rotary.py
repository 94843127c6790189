"""Rotary positions (RoFormer, arXiv:2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.ops import backends
from jaxlinear.pallas.parts import lanes

_FAST = 4  # turns per context, from which on ``scaling`` leaves a frequency unchanged


def frequencies_of(
    channels: int, *, fraction: float, base: float = 10_000.0, scaling: float = 0.0, context: int = 1
) -> np.ndarray:
    """``base ** (-i / n)`` radians per token for each of the n pairs of channels that make up ``fraction`` of a head.

    With ``scaling``, as in Llama 3.1 (github.com/meta-llama/llama-models, ``apply_scaling``), frequencies that turn less
    than once in ``context`` tokens are divided by ``scaling`` and those that turn four times or more stay; in between, the
    result is interpolated linearly in the number of turns.
    """
    pairs = int(channels * fraction) // 2
    frequencies = base ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    if not scaling:
        return frequencies
    kept = np.clip((context * frequencies / (2 * np.pi) - 1) / (_FAST - 1), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling


def turn(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates the first channels of each head by its position (RoFormer, arXiv:2104.09864).

    Args:
      x: ``[B, T, H, K]``.
      positions: ``[B or 1, T]`` int32.
      frequencies: of n pairs of channels, in radians per token: channel i turns with channel i + n, and channels from 2 n
        on do not turn.
    """
    half = len(frequencies)
    if half == 0:
        return x
    # The angle is computed in two parts, position = 1024 * high + low, since beyond about 10^5 positions float32 cannot
    # hold position * frequency to a small fraction of a turn.
    low, high = positions % 1024, positions // 1024
    per_high = jnp.asarray(np.mod(1024 * frequencies, 2 * np.pi), jnp.float32)
    angle_low = low[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    angle_high = high[..., None].astype(jnp.float32) * per_high[None, None]
    angle = (angle_low + angle_high)[:, :, None]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    if backends.platform() == "tpu" and x.dtype == jnp.bfloat16 and half % lanes.LANES:
        # XLA for TPUs would write each part of the heads as an array of its own, its last axis padded to whole registers.
        cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)
        fixed = [(0, 0)] * 3 + [(0, x.shape[-1] - 2 * half)]
        cos, sin = jnp.pad(cos, fixed, constant_values=1), jnp.pad(sin, fixed)
        return x * cos + _partners(x, half) * sin
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _partners(x: jax.Array, half: int) -> jax.Array:
    """Channel i + half, negated, in the place of channel i, and channel i in that of channel i + half, as a product with a
    matrix of 1, -1 and 0, which is exact."""
    pairs, places = np.arange(half), np.zeros((x.shape[-1], x.shape[-1]), np.float32)
    places[pairs + half, pairs], places[pairs, pairs + half] = -1, 1
    return jnp.einsum("bthk,kj->bthj", x, jnp.asarray(places, x.dtype))
