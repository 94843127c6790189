"""Kernels of causal softmax attention, full or windowed, forward and backward.

JAX's splash attention on TPU; ``attention_gpu`` on GPU. On other platforms the TPU kernels are interpreted.
"""

import jax

from jaxlinear.pallas.attention import gpu as attention_gpu
from jaxlinear.pallas.attention import tpu as attention_tpu
from jaxlinear.pallas.attention.tpu import SAVED as SAVED
from jaxlinear.pallas.parts.target import Target


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, runs: jax.Array | None, *, window: int, scale: float, target: Target
) -> jax.Array:
    """Query t sees the keys P+t-window+1 .. P+t of its own document.

    Args:
      q: ``[B, T, H, K]``, k: ``[B, P+T, G, K]``, v: ``[B, P+T, G, V]``.
      runs: ``[B, P+T]`` int32, a number for each document of the row; or None.

    Returns:
      o ``[B, T, H, V]`` in the dtype of v.
    """
    kernel = attention_gpu if target.platform == "gpu" else attention_tpu
    return kernel.attention(q, k, v, runs, window=window, scale=scale, target=target)
