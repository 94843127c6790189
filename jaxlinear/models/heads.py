"""Norms over each head of ``[B, T, H * K]``, whose arithmetic is in ``ops.heads``."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.layers import RMSNorm
from jaxlinear.parallel import operations, sharding


def by_head(x: jax.Array, heads: int, *inner: int) -> jax.Array:
    """``[B, T, H * K]`` -> ``[B, T, H, K]``, with the heads sharded over the mesh; or ``[B, T, H, *inner, K]``."""
    x = x.reshape(*x.shape[:2], heads, *inner, -1)
    return sharding.constrain(x, "batch", "time", "heads", *(None,) * (x.ndim - 3))


class HeadNorm(RMSNorm):
    """``RMSNorm`` over each head of ``[B, T, H * K]``, with the same weights for all; the result in ``dtype``, by default
    that of x."""

    def __init__(self, channels: int, *, epsilon: float, offset: float, rngs: nnx.Rngs):
        super().__init__(channels, axis=None, epsilon=epsilon, offset=offset, rngs=rngs)

    def __call__(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        heads = x.shape[-1] // self.scale.shape[0]
        y = operations.normalise_heads(x, heads, self.epsilon, weights=self.factors)
        return y.astype(dtype or x.dtype)

    def gated(self, x: jax.Array, gate: jax.Array, activation: str = "silu") -> jax.Array:
        """The norm times the activation of ``gate``, both ``[B, T, H * K]``."""
        return operations.gated_rms_norm(
            x, gate, self.factors, epsilon=self.epsilon, norm_before_gate=True, activation=activation
        )


class GroupNorm(nnx.Module):
    """Mean 0 and variance 1 over each of ``heads`` heads of ``[B, T, H * K]``."""

    def __init__(self, heads: int, epsilon: float):
        self.heads, self.epsilon = heads, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return operations.normalise_heads(x, self.heads, self.epsilon, centred=True).astype(x.dtype)
