"""Lightning attention: the linear attention of TransNormerLLM (Qin et al. 2023, arXiv:2307.14995), whose chunked form is
Lightning Attention-2 (arXiv:2401.04658).

    q_t, k_t = swish(W_q x_t), swish(W_k x_t)           v_t = W_v x_t
    S_t = lambda S_{t-1} + k_t v_t^T                    o_t = S_t^T q_t, in heads
    lambda = exp(-8 (h + 1) / H (1 - l / L))            in head h of H, layer l of L, from 0
    y_t = W_o ((W_u x_t) * norm(o_t))                   all heads normalised together

``norm`` is the paper's SRMSNorm, an RMSNorm with no learned scale. Of the paper's positions this is the decay; LRPE, which
the paper adds in the first layer, is left out. Kernels start normal with variance 1 / fan-in: the authors' constant
standard deviation of 0.02 is that of D = 2,500.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import by_head
from jaxlinear.models.layers import parameter, rms_norm
from jaxlinear.models.mixer import MatrixMixer, State
from jaxlinear.ops.linear_attention.op import flops as linear_attention_flops
from jaxlinear.parallel import operations


class Lightning(MatrixMixer):
    """Linear attention with a constant decay by head and layer over ``[B, T, D]``. State: ``memory [B, H, K, V]``.

    ``log_decay [H]`` is among the parameters because it differs from layer to layer and layers are scanned. It has no
    gradient, so training leaves it unchanged.
    """

    READS = ("num_heads", "recurrent_heads", "key_width", "value_width")

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config)
        self.epsilon = config.norm_epsilon
        self.query, self.key = (self.project_keys(config, rngs=rngs) for _ in range(2))
        self.value, self.gate = (self.project_values(config, rngs=rngs) for _ in range(2))
        place = 1 - jnp.asarray(layer, jnp.float32) / config.num_layers
        decay = lambda key, shape, dtype: place * jnp.asarray(-8 * np.arange(1, shape[0] + 1) / shape[0], dtype)  # noqa: E731
        self.log_decay = parameter(decay, (self.heads,), ("heads",), rngs)
        self.out = self.project_out(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        q, k = (by_head(jax.nn.silu(project(x)), self.heads) for project in (self.query, self.key))
        v = by_head(self.value(x), self.heads)
        log_decay = lax.stop_gradient(self.log_decay[...])
        past = None if state is None else state["memory"]
        o, memory = operations.linear_attention(q, k, v, log_decay, past, scale=1.0, segment_ids=segment_ids)
        o = rms_norm(o.reshape(*x.shape[:2], -1), self.epsilon)
        return self.out(self.gate(x) * o), {"memory": memory}

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Queries and keys D x H K, values, gate and output D x H V, and the recurrence."""
        h, k, v = cls.widths(config)
        return 2 * config.width * h * (2 * k + 3 * v) + linear_attention_flops(h, k, v)
