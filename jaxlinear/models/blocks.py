"""A residual block, the same for every mixer, and a period: one block for each name in the pattern."""

import jax
from flax import nnx

from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import GatedMLP, RMSNorm
from jaxlinear.parallel import sharding


class Block(nnx.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``, over ``[B, T, D]``."""

    def __init__(self, config: ModelConfig, mixer: str, *, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(config.width, rngs=rngs)
        self.mixer = mixers.find(mixer)(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, rngs=rngs)
        self.mlp = GatedMLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, state=None):
        y, state = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, state=state)
        x = sharding.constrain(x + y, "batch", "time", None)
        x = x + self.mlp(self.mlp_norm(x))
        return sharding.constrain(x, "batch", "time", None), state


class Period(nnx.Module):
    """The blocks of one repetition of the pattern, or of its beginning. State: a list, one entry a block."""

    def __init__(self, config: ModelConfig, pattern: tuple[str, ...], *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, mixer, rngs=rngs) for mixer in pattern])

    def init_state(self, batch: int) -> list:
        return [block.mixer.init_state(batch) for block in self.blocks]

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: list | None = None):
        states = []
        for i, block in enumerate(self.blocks):
            x, block_state = block(x, segment_ids=segment_ids, state=None if state is None else state[i])
            states.append(block_state)
        return x, states
