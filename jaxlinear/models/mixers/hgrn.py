"""The hierarchically gated recurrent network HGRN (Qin et al. 2023, arXiv:2311.04823), in its real form.

    f_t = b + (1 - b) sigmoid(W_f x_t)                     forget gate, by channel, at least b
    h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t)
    y_t = W_o (norm(h_t) * silu(W_g x_t))                  all channels normalised together

The form is that of flash-linear-attention. The paper's own is complex: a learned angle rotates the state at every step.

The lower bounds b are those of HGRN2, which took them over (``hgrn2.py``): 0 in the first layer and rising with depth, from
one learned array of logits ``[L, R]`` that start out equal. Kernels start normal with variance 1 / fan-in.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, RMSNorm, fan_in_normal, parameter
from jaxlinear.models.mixer import Mixer, State
from jaxlinear.models.mixers.hgrn2 import lower_bounds
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations, sharding


class HGRN(Mixer):
    """HGRN over ``[B, T, D]``, with R = ``recurrent_width`` channels. State: ``h [B, R]``.

    ``lower_bound`` is this layer's row of the logits; in the module as the model runs it, it is the bound itself
    (``ACROSS_LAYERS``). A module run on its own has bounds of 0 at first.
    """

    READS = ("recurrent_width",)
    OVER_SEQUENCE = True
    ACROSS_LAYERS = {"lower_bound": lower_bounds}

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        width, self.inner = config.width, config.recurrent_width
        self.dtype = config.activation_dtype
        axes = ("embed", "recurrent")
        self.input = Linear(width, self.inner, axes=axes, bias=False, rngs=rngs)
        self.forget = Linear(width, self.inner, axes=axes, bias=False, rngs=rngs)
        self.gate = Linear(width, self.inner, axes=axes, bias=False, rngs=rngs)
        self.lower_bound = parameter(nnx.initializers.zeros, (self.inner,), axes[1:], rngs)
        epsilon, offset = config.norm_epsilon, config.norm_offset
        self.norm = RMSNorm(self.inner, axis="recurrent", epsilon=epsilon, offset=offset, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(self.inner, width, axes=axes[::-1], bias=False, init=init, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return {"h": jnp.zeros((batch, self.inner), dtypes.wide(self.dtype))}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        wide = dtypes.wide(x.dtype)
        inner, forget = (
            sharding.constrain(project(x), "batch", "time", "recurrent").astype(wide)
            for project in (self.input, self.forget)
        )
        # 1 - f, and f from it: where f is near 1, its rounded value says too little about 1 - f.
        written = (1 - self.lower_bound[...].astype(wide))[None, None] * jax.nn.sigmoid(-forget)
        kept, inner = 1 - written, written * jax.nn.silu(inner)
        past = None if state is None else state["h"]
        h, last = operations.linear_recurrence(kept, inner, past, segment_ids=segment_ids)
        x = operations.overlapping(x, (kept, inner))  # the states do not depend on the gate
        gate = jax.nn.silu(sharding.constrain(self.gate(x), "batch", "time", "recurrent"))
        return self.out(self.norm(h.astype(x.dtype)) * gate), {"h": last}

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Four projections D x R; for each channel the gate above its bound, what it leaves of the state, and the input
        times that (1 each), and the recurrence (2)."""
        d, r = config.width, config.recurrent_width
        return 4 * 2 * d * r + 5 * r
