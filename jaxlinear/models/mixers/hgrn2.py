"""The gated linear RNN with state expansion HGRN2 (Qin et al. 2024, arXiv:2404.07904).

    f_t = b + (1 - b) sigmoid(W_f x_t)                  forget gate, by key channel, at least b
    q_t, k_t, v_t = swish(W_q x_t), 1 - f_t, W_v x_t    in heads
    S_t = diag(f_t) S_{t-1} + k_t v_t^T                 o_t = K^-1/2 S_t^T q_t
    y_t = W_o norm(o_t)                                 all heads normalised together, with an epsilon of its own if wanted

The lower bounds b of all layers come from one learned array of logits ``[L, H K]``: their softmax over the layers, summed
up to each layer, minus that of the first layer, whose bound is 0. They rise with depth, so that deep layers remember longer
(HGRN, arXiv:2311.04823). The logits start out equal. Kernels start normal with variance 1 / fan-in: the authors' constant
standard deviation of 0.02 is that of D = 2,500.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import by_head
from jaxlinear.models.layers import RMSNorm, parameter
from jaxlinear.models.mixer import MatrixMixer, State, per_head
from jaxlinear.ops import dtypes
from jaxlinear.ops.linear_attention.op import flops as linear_attention_flops
from jaxlinear.parallel import operations

EXPANSION = 128  # K
_LOWEST = -15.0  # of the gate before its sigmoid: not far below, 1 - f is 1 in float32, and log f would be -inf


def lower_bounds(logits: jax.Array) -> jax.Array:
    """``[L, H K]`` -> the same: 0 in the first layer, and below 1 in the last."""
    shares = jax.nn.softmax(logits, axis=0)
    return jnp.cumsum(shares.at[0].set(0), axis=0)


class HGRN2(MatrixMixer):
    """HGRN2 over ``[B, T, D]``. State: ``memory [B, H, K, V]``.

    ``lower_bound`` is this layer's row of the logits; in the module as the model runs it, it is the bound itself
    (``ACROSS_LAYERS``). A module run on its own has bounds of 0 at first.
    """

    READS = ("recurrent_heads", "key_width", "value_width", "output_norm_epsilon")
    ACROSS_LAYERS = {"lower_bound": lower_bounds}

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config)
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        self.query, self.forget = (self.project_keys(config, rngs=rngs) for _ in range(2))
        self.value = self.project_values(config, rngs=rngs)
        self.lower_bound = parameter(nnx.initializers.zeros, (keys,), ("heads",), rngs)
        epsilon = config.output_norm_epsilon or config.norm_epsilon
        self.norm = RMSNorm(values, axis="heads", epsilon=epsilon, offset=config.norm_offset, rngs=rngs)
        self.out = self.project_out(config, rngs=rngs)

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int, int]:
        """H, K and V: K = V = 128 and H = D / K, unless K or ``recurrent_heads`` is given; V is D / H unless given."""
        key = config.key_width or EXPANSION
        if not config.recurrent_heads and config.width % key:
            raise UserError(
                f"hgrn2: heads of {key} channels do not divide model.width={config.width}; set model.key_width"
            )
        heads = config.recurrent_heads or config.width // key
        key = config.key_width or per_head(cls, config.width, heads)
        return heads, key, config.value_width or per_head(cls, config.width, heads)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        k = self._input_gate(x)
        log_decay = by_head(jnp.log1p(-k), self.heads)
        q = by_head(jax.nn.silu(self.query(x)), self.heads)
        k, v = (by_head(y, self.heads) for y in (k.astype(x.dtype), self.value(x)))
        past = None if state is None else state["memory"]
        o, memory = operations.linear_attention(q, k, v, log_decay, past, segment_ids=segment_ids)
        return self.out(self.norm(o.reshape(*x.shape[:2], -1))), {"memory": memory}

    def _input_gate(self, x: jax.Array) -> jax.Array:
        """1 - f ``[B, T, H K]``, in float32: exact where f is near 1."""
        wide = dtypes.wide(x.dtype)
        gate = jnp.maximum(self.forget(x).astype(wide), _LOWEST)
        return (1 - self.lower_bound[...].astype(wide))[None, None] * jax.nn.sigmoid(-gate)

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Queries and forget gates D x H K, values and output D x H V, and the recurrence."""
        h, k, v = cls.widths(config)
        return 2 * config.width * h * (2 * k + 2 * v) + linear_attention_flops(h, k, v)
