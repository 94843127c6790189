"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464): the delta rule with Mamba-2's decay.

    log a_t = -exp(A_log) softplus(W_a x_t + dt_bias)                                                one per head
    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T
    o_t = K^-0.5 S_t^T q_t

q, k, v and beta are those of DeltaNet (``delta_net.py``). The layer is ``out(norm(o) * silu(W_g x))``, with the norm over
each head; with ``model.output_gate`` "none" it is ``out(norm(o))``.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import fan_in_normal, parameter
from jaxlinear.models.mixer import per_head, project
from jaxlinear.models.mixers.delta_net import DeltaNet
from jaxlinear.models.mixers.mamba2 import PROJECTION_SCALE, log_rates, time_step_biases, time_steps

RATE_RANGE = (0.0, 16.0)  # of exp(A_log), when training begins


class GatedDeltaNet(DeltaNet):
    """Like ``DeltaNet``, including its state."""

    OWN_GATE = "silu"

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int, int]:
        """H, K and V. Over all heads, K adds up to 3/4 D, and V is 2 K, unless they are given."""
        heads = config.heads
        key_width = config.key_width or per_head(cls, 3 * config.width // 4, heads)
        return heads, key_width, config.value_width or 2 * key_width

    def add_decay(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.decay = project(config, self.heads, init=fan_in_normal(PROJECTION_SCALE), rngs=rngs)
        self.A_log = parameter(log_rates(*RATE_RANGE), (self.heads,), ("heads",), rngs)
        self.dt_bias = parameter(time_step_biases, (self.heads,), ("heads",), rngs)

    def log_decay(self, x: jax.Array) -> jax.Array:
        """``[B, T, H]``."""
        dt = time_steps(self.decay(x), self.dt_bias[...])
        return -jnp.exp(self.A_log[...].astype(dt.dtype))[None, None] * dt

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """As DeltaNet, plus the projection of the decay, D x H."""
        return super().flops(config, length) + 2 * config.width * cls.widths(config)[0]
