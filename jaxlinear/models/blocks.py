"""A residual block, the same for every mixer, and a period: one block for each name in the pattern."""

import functools

import jax
from flax import nnx

from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import GatedMLP, RMSNorm
from jaxlinear.models.mixture_of_experts import MixtureOfExperts
from jaxlinear.parallel import sharding

Losses = dict[str, jax.Array]  # what a layer adds to the objective, by name: float32 scalars


class Block(nnx.Module):
    """``x + mixer(norm(x))``, then ``x + channel_mixer(norm(x))`` if there is one, over ``[B, T, D]``.

    ``layer`` is the block's place in the model, which some mixers' decays depend on: a number, traced under the scan.
    """

    def __init__(self, config: ModelConfig, mixer: str, *, layer: int | jax.Array, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.width, epsilon=config.norm_epsilon, offset=config.norm_offset)
        self.mixer_norm = norm(rngs=rngs)
        self.mixer = mixers.find(mixer)(config, layer=layer, rngs=rngs)
        self.has_mlp = config.channel_mixer != "none"
        if self.has_mlp:
            self.mlp_norm = norm(rngs=rngs)
            channel_mixer = MixtureOfExperts if config.channel_mixer == "mixture_of_experts" else GatedMLP
            self.mlp: MixtureOfExperts | GatedMLP = channel_mixer(config, rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, state=None):
        """``(y [B, T, D], state, losses)``."""
        y, state = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, state=state)
        x = sharding.constrain(x + y, "batch", "time", None)
        losses: Losses = {}
        if self.has_mlp:
            y = self.mlp_norm(x)
            if isinstance(self.mlp, MixtureOfExperts):
                y, losses = self.mlp(y, segment_ids=segment_ids)
            else:
                y = self.mlp(y)
            x = x + y
        return sharding.constrain(x, "batch", "time", None), state, losses


class Period(nnx.Module):
    """The blocks of one repetition of the pattern, or of its beginning. State: a list, one entry a block."""

    def __init__(self, config: ModelConfig, pattern: tuple[str, ...], *, first_layer: int | jax.Array, rngs: nnx.Rngs):
        self.blocks = nnx.List(
            [Block(config, mixer, layer=first_layer + i, rngs=rngs) for i, mixer in enumerate(pattern)]
        )

    def init_state(self, batch: int) -> list:
        return [block.mixer.init_state(batch) for block in self.blocks]

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: list | None = None):
        """``(y [B, T, D], state, losses)``, the losses summed over the blocks."""
        states: list = []
        losses: Losses = {}
        for i, block in enumerate(self.blocks):
            x, block_state, more = block(x, segment_ids=segment_ids, state=None if state is None else state[i])
            states.append(block_state)
            losses = add(losses, more)
        return x, states, losses


def add(losses: Losses, more: Losses) -> Losses:
    """The sum by name; a name that is missing counts as 0."""
    return losses | {name: losses[name] + value if name in losses else value for name, value in more.items()}
