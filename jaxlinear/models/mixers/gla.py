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
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import HeadNorm, by_head
from jaxlinear.models.layers import Linear
from jaxlinear.models.mixer import MatrixMixer, State
from jaxlinear.ops import dtypes
from jaxlinear.ops.linear_attention.op import flops as linear_attention_flops
from jaxlinear.parallel import operations

GATE_RANK = 16
GATE_DIVISOR = 16.0  # of the logarithm


class GLA(MatrixMixer):
    """Gated linear attention over ``[B, T, D]``. State: ``memory [B, H, K, V]``."""

    READS = ("num_heads", "recurrent_heads", "key_width", "value_width")

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config)
        xavier = nnx.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
        self.query, self.key = (self.project_keys(config, init=xavier, rngs=rngs) for _ in range(2))
        self.value = self.project_values(config, rngs=rngs)
        self.decay_in = Linear(config.width, GATE_RANK, axes=("embed", None), bias=False, init=xavier, rngs=rngs)
        keys = self.heads * self.key_width
        self.decay_out = Linear(GATE_RANK, keys, axes=(None, "heads"), init=xavier, rounded=False, rngs=rngs)
        self.gate = self.project_values(config, rngs=rngs)
        self.norm = HeadNorm(self.value_width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        self.out = self.project_out(config, rngs=rngs)

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int, int]:
        """H, K and V. Over all heads, K adds up to D / 2 and V to D, unless they are given."""
        return cls.widths_of(config, config.width // 2, config.width)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        q, k, v = (by_head(project(x), self.heads) for project in (self.query, self.key, self.value))
        gate = self.decay_out(self.decay_in(x).astype(dtypes.wide(x.dtype)))
        log_decay = by_head(jax.nn.log_sigmoid(gate) / GATE_DIVISOR, self.heads)
        past = None if state is None else state["memory"]
        o, memory = operations.linear_attention(q, k, v, log_decay, past, segment_ids=segment_ids)
        return self.out(self.norm.gated(o.reshape(*x.shape[:2], -1), self.gate(x))), {"memory": memory}

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Queries and keys D x H K, values, gate and output D x H V, two maps of rank 16 to the decay, recurrence."""
        h, k, v = cls.widths(config)
        low_rank = 2 * GATE_RANK * (config.width + h * k)
        return 2 * config.width * h * (2 * k + 3 * v) + low_rank + linear_attention_flops(h, k, v)
