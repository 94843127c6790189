"""The gated convolution of Based (Arora et al. 2024, arXiv:2402.18668; BaseConv of Zoology, arXiv:2312.04927):

    y = out(silu(convolution(W x)) * (V x))

with a causal filter of ``convolution_width`` tokens for each of the R = ``recurrent_width`` channels. R = 2 D, width 3 and
the SiLU are those of the models released with Based (github.com/HazyResearch/based); Zoology's equation has no SiLU and no
final map. It sees ``convolution_width`` tokens and no more: it belongs between layers that see further.
"""

import jax
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, fan_in_normal
from jaxlinear.models.mixer import Mixer, State
from jaxlinear.models.short_convolution import ShortConvolution
from jaxlinear.parallel import sharding


class Convolution(Mixer):
    """State: ``convolution [B, convolution_width-1, R]``, the last inputs of the convolution."""

    READS = ("recurrent_width", "convolution_width")
    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        width, inner = config.width, config.recurrent_width
        self.dtype = config.activation_dtype
        self.input = Linear(width, inner, axes=("embed", "recurrent"), rngs=rngs)
        self.gate = Linear(width, inner, axes=("embed", "recurrent"), rngs=rngs)
        self.convolution = ShortConvolution(
            inner, config.convolution_width, axis="recurrent", feeds_kernel=False, rngs=rngs
        )
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(inner, width, axes=("recurrent", "embed"), init=init, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return {"convolution": self.convolution.init_state(batch, self.dtype)}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        gate = sharding.constrain(self.gate(x), "batch", "time", "recurrent")
        inner = sharding.constrain(self.input(x), "batch", "time", "recurrent")
        past = None if state is None else state["convolution"]
        inner, past = self.convolution(inner, segment_ids=segment_ids, state=past)
        return self.out(inner * gate), {"convolution": past}

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Three projections D x R and the convolution."""
        d, r = config.width, config.recurrent_width
        return 3 * 2 * d * r + 2 * config.convolution_width * r
