"""FLOPs of a model. Each mixer has a formula of its own, ``Mixer.flops``.

The formulas count the multiplications and additions of every matrix product and recurrence (a multiply-add is 2) in the
forward pass. The backward pass costs twice that. Recomputation is not counted (it is the program's choice, not the
model's). Norms, activations and the optimiser are left out: less than 1% at any size worth a formula.
"""

from collections.abc import Callable

from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig

FORWARD_AND_BACKWARD = 3


def gated_mlp(config: ModelConfig) -> float:
    """Three projections D x F."""
    return 3 * 2 * config.width * config.mlp_width


def mixture_of_experts(config: ModelConfig) -> float:
    """The router, D x E, and for each expert that a token is routed to, three projections D x F and the sum."""
    d, k = config.width, config.experts_per_token
    return 2 * d * config.experts + k * (3 * 2 * d * config.expert_width + 2 * d)


CHANNEL_MIXERS: dict[str, Callable[[ModelConfig], float]] = {
    "gated_mlp": gated_mlp,
    "mixture_of_experts": mixture_of_experts,
    "none": lambda config: 0,
}


def forward_flops_per_token(config: ModelConfig, length: int, *, logits: bool = True) -> float:
    """FLOPs of one token in a sequence of ``length``, without the embedding look-up; the logits are optional."""
    channel_mixer = CHANNEL_MIXERS[config.channel_mixer]
    layers = sum(mixers.find(name).flops(config, length) + channel_mixer(config) for name in config.layers)
    return layers + (2 * config.width * config.vocab_size if logits else 0)


def training_flops_per_token(config: ModelConfig, length: int, *, logits: bool = True) -> float:
    """FLOPs per token, forward and backward."""
    return FORWARD_AND_BACKWARD * forward_flops_per_token(config, length, logits=logits)
