"""The real-gated linear recurrent unit and the block around it, of Griffin and Hawk (De et al. 2024, arXiv:2402.19427).

    r_t = sigmoid(W_a x_t + b_a)                        recurrence gate
    i_t = sigmoid(W_x x_t + b_x)                        input gate
    log a_t = -8 softplus(L) r_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)

The block is ``out(gelu(gate(x)) * rg_lru(convolution(input(x))))``.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, fan_in_normal, parameter
from jaxlinear.models.mixer import Mixer, State
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations, sharding

DECAY_POWER = 8.0  # c of the paper
DECAY_RANGE = (0.9, 0.999)  # of a at r = 1, when training begins


class RGLRU(nnx.Module):
    """The recurrence with its gates, over ``[B, T, R]``. W_a and W_x are block-diagonal, with one block per head."""

    rounded_parameters = ("recurrence_kernel", "input_kernel")

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        block = width // heads
        axes = ("heads", None, None)
        self.recurrence_kernel = parameter(fan_in_normal(), (heads, block, block), axes, rngs)
        self.input_kernel = parameter(fan_in_normal(), (heads, block, block), axes, rngs)
        self.recurrence_bias = parameter(nnx.initializers.zeros, (width,), ("recurrent",), rngs)
        self.input_bias = parameter(nnx.initializers.zeros, (width,), ("recurrent",), rngs)
        self.decay = parameter(_decay_init, (width,), ("recurrent",), rngs)

    def __call__(
        self, x: jax.Array, first: jax.Array, initial_state: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """``[B, T, R]`` -> the same, and the last h ``[B, R]``. ``first`` ``[B, T]`` marks the first token of each
        document, which enters with weight 1."""
        h, final = operations.rg_lru(
            x,
            self.recurrence_kernel[...],
            self.recurrence_bias[...],
            self.input_kernel[...],
            self.input_bias[...],
            -DECAY_POWER * jax.nn.softplus(self.decay[...].astype(dtypes.wide(x.dtype))),
            first,
            initial_state,
            segment_ids=segment_ids,
        )
        return h.astype(x.dtype), final


class RGLRUBlock(Mixer):
    """Griffin's recurrent block (arXiv:2402.19427, section 2.4). State: ``h [B, R]``, ``convolution [B, 3, R]``,
    ``started [B]``: whether a token has been seen."""

    READS = ("num_heads", "recurrent_width", "convolution_width")
    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        width, inner = config.width, config.recurrent_width
        self.inner, self.convolution_width = inner, config.convolution_width
        self.dtype = config.activation_dtype
        self.input = Linear(width, inner, axes=("embed", "recurrent"), rngs=rngs)
        self.gate = Linear(width, inner, axes=("embed", "recurrent"), rngs=rngs)
        self.convolution_kernel = parameter(
            nnx.initializers.normal((0.01 / config.convolution_width) ** 0.5),
            (config.convolution_width, inner),
            (None, "recurrent"),
            rngs,
        )
        self.convolution_bias = parameter(nnx.initializers.zeros, (inner,), ("recurrent",), rngs)
        self.rg_lru = RGLRU(inner, config.gate_blocks, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(inner, width, axes=("recurrent", "embed"), init=init, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return {
            "h": jnp.zeros((batch, self.inner), dtypes.wide(self.dtype)),
            "convolution": jnp.zeros((batch, self.convolution_width - 1, self.inner), self.dtype),
            "started": jnp.zeros((batch,), bool),
        }

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        state = self.init_state(x.shape[0]) if state is None else state
        first = jnp.zeros(x.shape[:2], bool) if segment_ids is None else operations.document_starts(segment_ids)
        first = jnp.where(jnp.arange(x.shape[1])[None] == 0, ~state["started"][:, None], first)

        inner = sharding.constrain(self.input(x), "batch", "time", "recurrent")
        given = inner, self.convolution_kernel[...], self.convolution_bias[...], state["convolution"]
        inner, convolution = operations.short_convolution(
            *given, segment_ids=segment_ids, activation="none", channels="recurrent"
        )
        x = operations.overlapping(x, inner)  # the states do not depend on the gate
        gate = jax.nn.gelu(sharding.constrain(self.gate(x), "batch", "time", "recurrent"))
        inner, h = self.rg_lru(inner, first, state["h"], segment_ids)
        state = {"h": h, "convolution": convolution, "started": jnp.ones_like(state["started"])}
        return self.out(gate * inner), state

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Three projections D x R, two block-diagonal gates, the convolution, and the recurrence (2 for h, 3 for its
        input)."""
        d, r = config.width, config.recurrent_width
        gates = 2 * 2 * r * r // config.gate_blocks
        return 3 * 2 * d * r + gates + 2 * config.convolution_width * r + 5 * r


def _decay_init(key, shape, dtype):
    """L such that a^2 at r = 1 is uniform between the squares of ``DECAY_RANGE`` (the ring of LRU, arXiv:2303.06349)."""
    low, high = (bound**2 for bound in DECAY_RANGE)
    square = jax.random.uniform(key, shape, dtype, low, high)
    softplus = -0.5 * jnp.log(square) / DECAY_POWER
    return jnp.log(jnp.expm1(softplus))
