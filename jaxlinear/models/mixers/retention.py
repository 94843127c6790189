"""Multi-scale retention (RetNet, Sun et al. 2023, arXiv:2307.08621, section 2).

    q_t, k_t = turn_t(W_q x_t), turn_t(W_k x_t)         v_t = W_v x_t
    S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T          o_t = K^-1/2 S_t^T q_t, in head h = 0, 1, ...
    y_t = W_o (swish(W_g x_t) * norm(o_t))              each head normalised separately

``turn`` applies rotary positions (xPos is these plus the decay) to ``model.rotary_fraction`` of a head: all of it in the
paper and the presets, half by default, as in Griffin. ``norm`` is GroupNorm, which takes each head to mean 0 and variance
1, with no learned scale, as in the authors' code (torchscale); with ``model.head_norm`` "rms" it is an RMSNorm with one, as
in flash-linear-attention. Initialisation follows the authors' code: Xavier uniform, with gain 2^-2.5 except for W_o.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import GroupNorm, HeadNorm, by_head
from jaxlinear.models.mixer import MatrixMixer, State
from jaxlinear.ops import dtypes, rotary
from jaxlinear.ops.linear_attention.op import flops as linear_attention_flops
from jaxlinear.parallel import operations


class Retention(MatrixMixer):
    """Retention over ``[B, T, D]``. State: ``memory [B, H, K, V]`` and ``position [B]``, that of the next token.

    Only differences of positions matter within a document, so a document may begin at any position.
    """

    READS = (
        "num_heads",
        "recurrent_heads",
        "key_width",
        "value_width",
        "rotary_fraction",
        "rotary_base",
        "head_norm",
    )

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config)
        self.rotary_fraction, self.rotary_base = config.rotary_fraction, config.rotary_base
        small, xavier = (nnx.initializers.variance_scaling(scale, "fan_avg", "uniform") for scale in (2**-5, 1))
        self.query, self.key = (self.project_keys(config, init=small, rngs=rngs) for _ in range(2))
        self.value, self.gate = (self.project_values(config, init=small, rngs=rngs) for _ in range(2))
        self.norm: HeadNorm | GroupNorm = GroupNorm(self.heads, config.norm_epsilon)
        if config.head_norm == "rms":
            self.norm = HeadNorm(self.value_width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        self.out = self.project_out(config, init=xavier, rngs=rngs)

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int, int]:
        """H, K and V. Over all heads, K adds up to D and V to 2 D, unless they are given."""
        return cls.widths_of(config, config.width, 2 * config.width)

    @classmethod
    def rotary_width(cls, config: ModelConfig) -> int:
        return cls.widths(config)[1]

    def init_state(self, batch: int) -> State:
        return super().init_state(batch) | {"position": jnp.zeros((batch,), jnp.int32)}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        state = self.init_state(x.shape[0]) if state is None else state
        positions = state["position"][:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        q, k, v = (by_head(project(x), self.heads) for project in (self.query, self.key, self.value))
        turns = rotary.frequencies_of(q.shape[-1], fraction=self.rotary_fraction, base=self.rotary_base)
        q, k = (rotary.turn(y, positions, turns) for y in (q, k))
        log_decay = jnp.asarray(np.log1p(-(2.0 ** (-5.0 - np.arange(self.heads)))), dtypes.wide(x.dtype))
        o, memory = operations.linear_attention(q, k, v, log_decay, state["memory"], segment_ids=segment_ids)
        o, gate = o.reshape(*x.shape[:2], -1), self.gate(x)
        gated = self.norm.gated(o, gate) if isinstance(self.norm, HeadNorm) else jax.nn.silu(gate) * self.norm(o)
        return self.out(gated), {"memory": memory, "position": state["position"] + x.shape[1]}

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Queries and keys D x H K, values, gate and output D x H V, and the recurrence."""
        h, k, v = cls.widths(config)
        return 2 * config.width * h * (2 * k + 3 * v) + linear_attention_flops(h, k, v)
