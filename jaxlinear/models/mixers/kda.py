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
from jaxlinear.models.heads import HeadNorm, by_head
from jaxlinear.models.layers import Initializer, Linear, fan_in_normal, parameter
from jaxlinear.models.mixers import delta_net
from jaxlinear.models.mixers.mamba2 import PROJECTION_SCALE, RATE_RANGE, log_rates, time_step_biases, time_steps
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations


def widths(config: ModelConfig) -> tuple[int, int, int]:
    """H, K and V. Over all heads, K and V each add up to D, unless they are given."""
    return delta_net.widths(config, "kda")


class LowRank(nnx.Module):
    """``up(down(x))``: ``[B, T, D]`` -> ``[B, T, outputs]``, with a bias at the end if wanted."""

    def __init__(self, width: int, rank: int, outputs: int, *, init: Initializer, bias: bool = False, rngs: nnx.Rngs):
        self.down = Linear(width, rank, axes=("embed", None), bias=False, rngs=rngs)
        self.up = Linear(rank, outputs, axes=(None, "heads"), bias=bias, init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(self.down(x))


class KimiDeltaAttention(nnx.Module):
    """Over ``[B, T, D]``. State: ``memory [B, H, K, V]`` and that of ``DeltaInputs``."""

    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        self.widths = heads, key_width, value_width = widths(config)
        width, keys, inner = config.width, heads * key_width, heads * value_width
        self.inputs = delta_net.DeltaInputs(config, *self.widths, rngs=rngs)
        self.decay = LowRank(width, value_width, keys, init=fan_in_normal(PROJECTION_SCALE), rngs=rngs)
        self.A_log = parameter(log_rates(*RATE_RANGE), (heads,), ("heads",), rngs)
        self.dt_bias = parameter(time_step_biases, (keys,), ("heads",), rngs)
        self.gate = LowRank(width, value_width, inner, init=fan_in_normal(), bias=config.gate_bias, rngs=rngs)
        self.norm = HeadNorm(value_width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(inner, width, axes=("heads", "embed"), bias=False, init=init, rngs=rngs)

    def init_state(self, batch: int) -> dict[str, jax.Array]:
        memory = jnp.zeros((batch, *self.widths), dtypes.wide(self.inputs.dtype))
        return {"memory": memory, **self.inputs.init_state(batch)}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        past = {} if state is None else state
        (q, k, v, beta), new = self.inputs(x, segment_ids=segment_ids, past=past)
        heads = v.shape[2]
        dt = time_steps(self.decay(x), self.dt_bias[...])
        # The heads are split after the product: split before, it would be put in another order on TPUs, and back for the
        # kernel, and its gradient likewise.
        rates = jnp.repeat(jnp.exp(self.A_log[...].astype(dt.dtype)), self.widths[1])
        log_decay = by_head(-rates[None, None] * dt, heads)
        options = {"segment_ids": segment_ids, "negative_eigenvalues": self.inputs.negative_eigenvalues}
        o, new["memory"] = operations.delta_rule(q, k, v, beta, log_decay, past.get("memory"), **options)
        o = o.reshape(*x.shape[:2], -1).astype(x.dtype)
        return self.out(self.norm.gated(o, self.gate(x), "sigmoid")), new
