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
from jaxlinear.models.heads import per_head
from jaxlinear.models.layers import Linear, fan_in_normal, parameter
from jaxlinear.models.mixers.delta_net import DeltaInputs, DeltaOutput, has_gate
from jaxlinear.models.mixers.mamba2 import PROJECTION_SCALE, log_rates, time_step_biases, time_steps
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations

RATE_RANGE = (0.0, 16.0)  # of exp(A_log), when training begins


def widths(config: ModelConfig) -> tuple[int, int, int]:
    """H, K and V. Over all heads, K adds up to 3/4 D, and V is 2 K, unless they are given."""
    heads = config.heads
    key_width = config.key_width or per_head("gated_delta_net", 3 * config.width // 4, heads)
    return heads, key_width, config.value_width or 2 * key_width


class GatedDeltaNet(DeltaOutput):
    """Over ``[B, T, D]``. State: ``memory [B, H, K, V]`` and that of ``DeltaInputs``."""

    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        self.widths = heads, _, value_width = widths(config)
        self.inputs = DeltaInputs(config, *self.widths, rngs=rngs)
        init = fan_in_normal(PROJECTION_SCALE)
        self.decay = Linear(config.width, heads, axes=("embed", "heads"), bias=False, init=init, rngs=rngs)
        self.A_log = parameter(log_rates(*RATE_RANGE), (heads,), ("heads",), rngs)
        self.dt_bias = parameter(time_step_biases, (heads,), ("heads",), rngs)
        self._add_output(config, heads, value_width, gated=has_gate(config, "gated_delta_net"), rngs=rngs)

    def init_state(self, batch: int) -> dict[str, jax.Array]:
        memory = jnp.zeros((batch, *self.widths), dtypes.wide(self.inputs.dtype))
        return {"memory": memory, **self.inputs.init_state(batch)}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        past = {} if state is None else state
        (q, k, v, beta), new = self.inputs(x, segment_ids=segment_ids, past=past)
        dt = time_steps(self.decay(x), self.dt_bias[...])
        log_decay = -jnp.exp(self.A_log[...].astype(dt.dtype))[None, None] * dt
        options = {"segment_ids": segment_ids, "negative_eigenvalues": self.inputs.negative_eigenvalues}
        o, new["memory"] = operations.delta_rule(q, k, v, beta, log_decay, past.get("memory"), **options)
        return self._output(o, x), new
