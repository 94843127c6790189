"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): linear attention whose decay and input share a time step.

    dt_t = softplus(W_dt u_t + dt_bias)                         one per head
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T
    y_t = S_t^T C_t + D x_t

x, B and C are projections of the layer's input u after a short convolution and SiLU. The layer is
``out(norm(y * silu(z)))``, with z another projection.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import by_head
from jaxlinear.models.layers import Initializer, Linear, RMSNorm, fan_in_normal, parameter
from jaxlinear.models.mixer import MatrixMixer, State
from jaxlinear.models.short_convolution import ShortConvolution
from jaxlinear.ops import dtypes
from jaxlinear.ops.linear_attention.op import flops as linear_attention_flops
from jaxlinear.parallel import operations

RATE_RANGE = (1.0, 16.0)  # of A = exp(A_log), when training begins
TIME_STEP_RANGE = (1e-3, 1e-1)  # of softplus(dt_bias), when training begins
# Variance, over the fan-in, of the authors' projections, which are uniform within 1 / sqrt(fan-in).
PROJECTION_SCALE = 1 / 3


class Mamba2(MatrixMixer):
    """Over ``[B, T, D]``. In terms of linear attention, x is the value, B the key and C the query; all heads share one key
    and one query, and z is the gate. ``model.recurrent_width`` is the inner width, 2 D in the paper.

    State: ``memory [B, H, N, P]``, and the inputs of the convolutions ``query``, ``key`` ``[B, width-1, N]`` and ``value``
    ``[B, width-1, H P]``.
    """

    READS = ("recurrent_width", "key_width", "value_width", "convolution_width")

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config)
        width, inner = config.width, config.recurrent_width

        def project(outputs: int, axis: str | None) -> Linear:
            init = fan_in_normal(PROJECTION_SCALE)
            return Linear(width, outputs, axes=("embed", axis), bias=False, init=init, rngs=rngs)

        def convolve(channels: int, axis: str | None) -> ShortConvolution:
            width = config.convolution_width
            return ShortConvolution(channels, width, axis=axis, bias=True, feeds_kernel=False, rngs=rngs)

        self.gate, self.value = project(inner, "heads"), project(inner, "heads")
        self.key, self.query = project(self.key_width, None), project(self.key_width, None)
        self.time_step = project(self.heads, "heads")
        self.value_convolution = convolve(inner, "heads")
        self.key_convolution, self.query_convolution = convolve(self.key_width, None), convolve(self.key_width, None)
        self.A_log = parameter(log_rates(*RATE_RANGE), (self.heads,), ("heads",), rngs)
        self.dt_bias = parameter(time_step_biases, (self.heads,), ("heads",), rngs)
        self.D = parameter(nnx.initializers.ones, (self.heads,), ("heads",), rngs)
        self.norm = RMSNorm(inner, axis="heads", epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        init = fan_in_normal(PROJECTION_SCALE / config.num_layers)
        self.out = Linear(inner, width, axes=("heads", "embed"), bias=False, init=init, rngs=rngs)

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int, int]:
        """H, N and P: P is the value width, 64 unless given; N the key width, 128 unless given; H P = R."""
        key_width, value_width = config.key_width or 128, config.value_width or 64
        if config.recurrent_width % value_width:
            raise UserError(
                f"mamba2: the heads' width {value_width} does not divide model.recurrent_width={config.recurrent_width}; "
                "set model.value_width"
            )
        return config.recurrent_width // value_width, key_width, value_width

    def init_state(self, batch: int) -> State:
        return super().init_state(batch) | {
            "query": self.query_convolution.init_state(batch, self.dtype),
            "key": self.key_convolution.init_state(batch, self.dtype),
            "value": self.value_convolution.init_state(batch, self.dtype),
        }

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        past = {} if state is None else state
        new: State = {}
        q, new["query"] = self.query_convolution(self.query(x), segment_ids=segment_ids, state=past.get("query"))
        k, new["key"] = self.key_convolution(self.key(x), segment_ids=segment_ids, state=past.get("key"))
        v, new["value"] = self.value_convolution(self.value(x), segment_ids=segment_ids, state=past.get("value"))
        dt = time_steps(self.time_step(x), self.dt_bias[...])
        rate, skip = jnp.exp(self.A_log[...]).astype(dt.dtype), self.D[...].astype(dt.dtype)
        # On all channels [B, T, H P]: XLA for TPUs does elementwise work on heads of fewer than 128 channels with time as
        # the last axis, transposing the inputs to that layout and the results back.
        inputs = by_head(operations.scale_heads(v, dt), self.heads)
        y, new["memory"] = operations.linear_attention(
            q[:, :, None],
            k[:, :, None],
            inputs,
            -rate[None, None] * dt,
            past.get("memory"),
            scale=1.0,
            segment_ids=segment_ids,
        )
        skip = jnp.broadcast_to(skip[:, None], (self.heads, self.value_width)).reshape(-1)
        given = y.reshape(v.shape), self.gate(x), self.norm.factors, v, skip
        return self.out(operations.gated_rms_norm(*given, epsilon=self.norm.epsilon)), new

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Projections D x (2 R + 2 N + H) and R x D, the convolution over R + 2 N channels, the update and the read of the
        state (decays left out), and the skip."""
        d, r, w = config.width, config.recurrent_width, config.convolution_width
        h, n, p = cls.widths(config)
        recurrence = linear_attention_flops(h, n, p, decays=False)
        return 2 * d * (3 * r + 2 * n + h) + 2 * w * (r + 2 * n) + recurrence + 2 * r


def time_steps(logits: jax.Array, bias: jax.Array) -> jax.Array:
    """softplus(logits + bias): ``[B, T, C]`` and ``[C]`` -> ``[B, T, C]`` in float32."""
    wide = dtypes.wide(logits.dtype)
    return jax.nn.softplus(logits.astype(wide) + bias.astype(wide)[None, None])


def log_rates(low: float, high: float) -> Initializer:
    """A_log such that A is uniform in (low, high]."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        # A draw of exactly 0 would be a rate that no gradient changes; 1 minus a draw from [0, 1) is never 0.
        return jnp.log(low + (high - low) * (1 - jax.random.uniform(key, shape, dtype)))

    return init


def time_step_biases(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """dt_bias such that the logarithm of softplus(dt_bias) is uniform between those of ``TIME_STEP_RANGE``."""
    low, high = np.log(TIME_STEP_RANGE)
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return dt + jnp.log(-jnp.expm1(-dt))
