"""A residual block, the same for every mixer, and a period: one block for each name in a pattern."""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import GatedMLP, RMSNorm
from jaxlinear.models.mixture_of_experts import MixtureOfExperts
from jaxlinear.models.stacks import BLOCKS_AT_ONCE
from jaxlinear.parallel import sharding

Losses = dict[str, jax.Array]  # what a layer adds to the objective, by name: float32 scalars


class Block(nnx.Module):
    """``x + mixer(norm(x))``, then ``x + channel_mixer(norm(x))`` if there is one, over ``[B, T, D]``.

    ``layer`` is the block's place in the model, on which some mixers' decays depend: a number, traced under the scan.
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
    """The blocks of one repetition of a stack's pattern. State: a list with one entry per block."""

    def __init__(self, config: ModelConfig, pattern: tuple[str, ...], *, first_layer: int | jax.Array, rngs: nnx.Rngs):
        self.blocks = nnx.List(
            [Block(config, mixer, layer=first_layer + i, rngs=rngs) for i, mixer in enumerate(pattern)]
        )

    def init_state(self, batch: int) -> list:
        return [block.mixer.init_state(batch) for block in self.blocks]

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        state: list | None = None,
        remat: Callable[[Callable], Callable] = lambda function: function,
    ):
        """``(y [B, T, D], state, losses)``, the losses summed over the blocks. Each run of ``BLOCKS_AT_ONCE`` blocks is a
        function of its input, parameters and state, which ``remat`` wraps: the inputs of the runs are stored, and while one
        run is recomputed all of its activations are in memory."""
        states: list = []
        losses: Losses = {}
        for begin in range(0, len(self.blocks), BLOCKS_AT_ONCE):
            blocks = list(self.blocks)[begin : begin + BLOCKS_AT_ONCE]
            past = [None] * len(blocks) if state is None else state[begin : begin + BLOCKS_AT_ONCE]
            graph, parameters = nnx.split(nnx.List(blocks))
            x, new, more = remat(_applied(graph, segment_ids))(x, parameters, past)
            states += new
            losses = add(losses, more)
        return x, states, losses


def _applied(graph: nnx.GraphDef, segment_ids: jax.Array | None):
    """Blocks as a function ``(x, parameters, states) -> (y, states, losses)``."""

    def apply(x: jax.Array, parameters: nnx.State, past: list):
        states: list = []
        losses: Losses = {}
        for block, state in zip(nnx.merge(graph, parameters), past, strict=True):
            x, state, more = block(x, segment_ids=segment_ids, state=state)
            states.append(state)
            losses = add(losses, more)
        return x, states, losses

    return apply


def add(losses: Losses, more: Losses) -> Losses:
    """The sum by name; a name that is missing counts as 0."""
    return losses | {name: losses[name] + value if name in losses else value for name, value in more.items()}
