"""Gated linear attention (Yang et al. 2023, arXiv:2312.06635, section 4).

    q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t           in heads
    log a_t = log_sigmoid(W_2 W_1 x_t + b) / 16         by key channel; W_2 W_1 is of rank 16
    S_t = diag(a_t) S_{t-1} + k_t v_t^T                 o_t = K^-1/2 S_t^T q_t
    y_t = W_o (swish(W_r x_t) * norm(o_t))              each head normalised separately

The norm is an RMSNorm and W_r has no bias, as in the models that the authors published (flash-linear-attention); the paper
has a LayerNorm and a bias. Queries, keys and both maps of the gate are initialised as in the authors' layer: Xavier uniform
with gain 2^-2.5. b starts at 0, a decay of 0.96.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import HeadNorm, by_head, per_head
from jaxlinear.models.layers import Linear, fan_in_normal
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations

GATE_RANK = 16
GATE_DIVISOR = 16.0  # of the logarithm


def widths(config: ModelConfig) -> tuple[int, int, int]:
    """H, K and V. Over all heads, K adds up to D / 2 and V to D, unless they are given."""
    heads = config.heads
    key = config.key_width or per_head("gla", config.width // 2, heads)
    return heads, key, config.value_width or per_head("gla", config.width, heads)


class GLA(nnx.Module):
    """Gated linear attention over ``[B, T, D]``. State: ``memory [B, H, K, V]``."""

    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        width = config.width
        self.heads, self.key_width, self.value_width = widths(config)
        self.dtype = config.activation_dtype
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        xavier = nnx.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
        self.query = Linear(width, keys, axes=("embed", "heads"), bias=False, init=xavier, rngs=rngs)
        self.key = Linear(width, keys, axes=("embed", "heads"), bias=False, init=xavier, rngs=rngs)
        self.value = Linear(width, values, axes=("embed", "heads"), bias=False, rngs=rngs)
        self.decay_in = Linear(width, GATE_RANK, axes=("embed", None), bias=False, init=xavier, rngs=rngs)
        self.decay_out = Linear(GATE_RANK, keys, axes=(None, "heads"), init=xavier, rounded=False, rngs=rngs)
        self.gate = Linear(width, values, axes=("embed", "heads"), bias=False, rngs=rngs)
        self.norm = HeadNorm(self.value_width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(values, width, axes=("heads", "embed"), bias=False, init=init, rngs=rngs)

    def init_state(self, batch: int) -> dict[str, jax.Array]:
        shape = (batch, self.heads, self.key_width, self.value_width)
        return {"memory": jnp.zeros(shape, dtypes.wide(self.dtype))}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        q, k, v = (by_head(project(x), self.heads) for project in (self.query, self.key, self.value))
        gate = self.decay_out(self.decay_in(x).astype(dtypes.wide(x.dtype)))
        log_decay = by_head(jax.nn.log_sigmoid(gate) / GATE_DIVISOR, self.heads)
        past = None if state is None else state["memory"]
        o, memory = operations.linear_attention(q, k, v, log_decay, past, segment_ids=segment_ids)
        return self.out(self.norm.gated(o.reshape(*x.shape[:2], -1), self.gate(x))), {"memory": memory}
