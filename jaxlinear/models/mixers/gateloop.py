"""GateLoop (Katsch 2023, arXiv:2311.01927): a recurrence whose transition, both decay and rotation, depends on the data.

    q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t
    a_t = sigmoid(alpha_t) exp(i beta_t),   alpha_t = W_alpha x_t + b_alpha,   beta_t = W_beta x_t + b_beta
    h_t = a_t h_{t-1} + k_t v_t
    y_t = W_o (silu(W_g x_t) * norm(Re(q_t h_t)))

It has as many heads as channels, as in the paper's models: every channel has a key, a value and a state of one number, so
the state is no larger than a token. The norm is over groups of channels, without a mean, like that of the heads of RetNet
(arXiv:2307.08621), from which the paper takes the output gate.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import HeadNorm
from jaxlinear.models.layers import Linear, fan_in_normal, parameter
from jaxlinear.models.mixer import Mixer, State, per_head
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations, sharding


class GateLoop(Mixer):
    """GateLoop over ``[B, T, D]``, with R = ``recurrent_width`` channels, normalised in as many groups as the config has
    ``heads``. State: ``h [B, R]``, complex64."""

    READS = ("num_heads", "recurrent_heads", "recurrent_width")
    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        width, inner = config.width, config.recurrent_width
        self.inner, self.groups = inner, config.heads
        self.dtype = config.activation_dtype
        axes = ("embed", "recurrent")
        self.query = Linear(width, inner, axes=axes, bias=False, rngs=rngs)
        self.key = Linear(width, inner, axes=axes, bias=False, rngs=rngs)
        self.value = Linear(width, inner, axes=axes, bias=False, rngs=rngs)
        self.magnitude = Linear(width, inner, axes=axes, bias=False, rngs=rngs)
        self.magnitude_bias = parameter(nnx.initializers.zeros, (inner,), axes[1:], rngs)
        self.phase = Linear(width, inner, axes=axes, bias=False, rngs=rngs)
        self.phase_bias = parameter(nnx.initializers.zeros, (inner,), axes[1:], rngs)
        self.gate = Linear(width, inner, axes=axes, bias=False, rngs=rngs)
        group = per_head(GateLoop, inner, self.groups)
        self.norm = HeadNorm(group, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(inner, width, axes=("recurrent", "embed"), bias=False, init=init, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return {"h": jnp.zeros((batch, self.inner), dtypes.wide(self.dtype, jnp.complex64))}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        wide = dtypes.wide(x.dtype)
        q, k, v = (
            sharding.constrain(project(x), "batch", "time", "recurrent").astype(wide)
            for project in (self.query, self.key, self.value)
        )
        past = None if state is None else state["h"]
        h, last = operations.linear_recurrence(self._transition(x), k * v, past, segment_ids=segment_ids)
        o = self.norm((q * jnp.real(h)).astype(x.dtype))
        return self.out(jax.nn.silu(self.gate(x)) * o), {"h": last}

    def _transition(self, x: jax.Array) -> jax.Array:
        """a ``[B, T, R]``, complex64. Alpha and beta are not rounded to the dtype of x: a phase accumulates over time."""
        wide = dtypes.wide(x.dtype)
        alpha, beta = (
            linear.product(x, wide) + bias[...].astype(wide)[None, None]
            for linear, bias in ((self.magnitude, self.magnitude_bias), (self.phase, self.phase_bias))
        )
        magnitude = jax.nn.sigmoid(alpha)
        return jax.lax.complex(magnitude * jnp.cos(beta), magnitude * jnp.sin(beta))

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Seven projections D x R; for each channel the transition from its magnitude and phase (2), k v, a complex product
        with the state to which it is added (7), and the real part of its product with q (1)."""
        d, r = config.width, config.recurrent_width
        return 7 * 2 * d * r + 11 * r
