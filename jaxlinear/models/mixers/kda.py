"""Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692): the gated delta rule with a decay per key channel.

    log a_t = -exp(A_log) softplus(W_up W_down x_t + dt_bias)           one per key channel, A_log one per head
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  S' = diag(a_t) S_{t-1}
    o_t = K^-0.5 S_t^T q_t

q, k, v and beta are those of DeltaNet (``delta_net.py``). The layer is ``out(norm(o) * sigmoid(U_up U_down x))``, with the
norm over each head. Both low-rank maps have rank V, the value width of a head. With ``model.gate_bias`` the gate's map has
a bias, as in flash-linear-attention.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import by_head
from jaxlinear.models.layers import Initializer, Linear, fan_in_normal, parameter
from jaxlinear.models.mixers.delta_net import DeltaNet
from jaxlinear.models.mixers.mamba2 import PROJECTION_SCALE, RATE_RANGE, log_rates, time_step_biases, time_steps


class LowRank(nnx.Module):
    """``up(down(x))``: ``[B, T, D]`` -> ``[B, T, outputs]``, with a bias at the end if wanted."""

    def __init__(self, width: int, rank: int, outputs: int, *, init: Initializer, bias: bool = False, rngs: nnx.Rngs):
        self.down = Linear(width, rank, axes=("embed", None), bias=False, rngs=rngs)
        self.up = Linear(rank, outputs, axes=(None, "heads"), bias=bias, init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(self.down(x))


class KimiDeltaAttention(DeltaNet):
    """Like ``DeltaNet``, including its state and widths."""

    READS = (*(key for key in DeltaNet.READS if key != "output_gate"), "gate_bias")

    def add_decay(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        keys, init = self.heads * self.key_width, fan_in_normal(PROJECTION_SCALE)
        self.decay = LowRank(config.width, self.value_width, keys, init=init, rngs=rngs)
        self.A_log = parameter(log_rates(*RATE_RANGE), (self.heads,), ("heads",), rngs)
        self.dt_bias = parameter(time_step_biases, (keys,), ("heads",), rngs)

    def make_gate(self, config: ModelConfig, rngs: nnx.Rngs) -> LowRank:
        inner = self.heads * self.value_width
        return LowRank(config.width, self.value_width, inner, init=fan_in_normal(), bias=config.gate_bias, rngs=rngs)

    def log_decay(self, x: jax.Array) -> jax.Array:
        """``[B, T, H, K]``."""
        dt = time_steps(self.decay(x), self.dt_bias[...])
        # The heads are split after the product: split before, it would be put in another order on TPUs, and back for the
        # kernel, and its gradient likewise.
        rates = jnp.repeat(jnp.exp(self.A_log[...].astype(dt.dtype)), self.key_width)
        return by_head(-rates[None, None] * dt, self.heads)

    def gated(self, o: jax.Array, gate: jax.Array) -> jax.Array:
        return self.norm.gated(o, gate, "sigmoid")

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """The updates, the projection H V x D, and two maps of rank V, to the decays, H K, and to the gate, H V."""
        h, k, v = cls.widths(config)
        low_rank = 2 * v * (2 * config.width + h * k + h * v)
        return 2 * config.width * h * v + low_rank + cls.flops_of_updates(config)
