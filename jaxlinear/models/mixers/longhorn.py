"""Longhorn (Liu et al. 2024, arXiv:2407.14207): the layer of Mamba around the answer to an online regression.

    r_t, k_t, q_t = W_s x_t
    beta_t = sigmoid(W_dt r_t + dt_bias),   dt_t = beta_t / (1 + beta_t |k_t|^2)       one per channel
    S_t = (1 - dt_t (k_t^T)^2) S_{t-1} + (dt_t x_t) k_t^T                              N numbers per channel
    y_t = W_o ((S_t q_t + D x_t) * silu(z_t))

with x and z as in Mamba: what the state forgets follows from the key alone. Of all states, S_t has the least
|S - S_{t-1}|^2 + beta_t |S k_t - x_t|^2 in each channel, except that k_t k_t^T is reduced to its diagonal.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import parameter
from jaxlinear.models.mixers.mamba import Mamba


class Longhorn(Mamba):
    """Like ``Mamba``, including its state and widths."""

    READS = ("recurrent_width", "key_width", "time_step_rank", "convolution_width")

    @staticmethod
    def epsilon_of_selection(config: ModelConfig) -> None:
        """A pattern may also contain Falcon-Mamba: its norms do not belong to this mixer."""

    def add_transition(self, rngs: nnx.Rngs) -> None:
        self.dt_bias = parameter(nnx.initializers.zeros, (self.inner,), ("recurrent",), rngs)

    def transition(self, logits: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        beta = jax.nn.sigmoid(logits + self.dt_bias[...].astype(logits.dtype)[None, None])
        k = B.astype(logits.dtype)
        return beta / (1 + beta * jnp.sum(k * k, axis=-1, keepdims=True)), None

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """As Mamba, plus for each number of the state what it keeps (2, not 1), |k|^2 per token and dt per channel."""
        r, (n, _) = config.recurrent_width, cls.widths(config)
        return super().flops(config, length) + r * n + 2 * n + 3 * r
