"""FLOPs of a model, by a written formula for each kind of layer.

Counted are the multiplications and additions of every matrix product and recurrence (a multiply-add is 2) in the forward
pass; the backward pass costs twice that, and recomputation is not counted (it is the program's choice, not the model's).
Norms, activations and the optimiser are left out: less than 1% at any size worth a formula.
"""

from collections.abc import Callable

from jaxlinear.models.config import ModelConfig

FORWARD_AND_BACKWARD = 3


def rg_lru(config: ModelConfig, length: int) -> float:
    """Three projections D x R, two block-diagonal gates, the convolution, and the recurrence (2 for h, 3 for its input)."""
    d, r = config.width, config.recurrent_width
    gates = 2 * 2 * r * r // config.gate_blocks
    return 3 * 2 * d * r + gates + 2 * config.convolution_width * r + 5 * r


def sliding_window(config: ModelConfig, length: int) -> float:
    """Queries and outputs D x D, one key and value head, and the products with the tokens that are seen."""
    d, k = config.width, config.head_width
    seen = mean_context(length, config.window)
    return 2 * 2 * d * config.num_heads * k + 2 * 2 * d * k + 2 * 2 * config.num_heads * k * seen


def gated_mlp(config: ModelConfig) -> float:
    """Three projections D x F."""
    return 3 * 2 * config.width * config.mlp_width


MIXERS: dict[str, Callable[[ModelConfig, int], float]] = {"rg_lru": rg_lru, "sliding_window": sliding_window}


def mean_context(length: int, window: int) -> float:
    """How many tokens a query sees, on average over ``length`` positions: min(t, window) for t = 1 .. length."""
    window = min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
    """Of one token in a sequence of ``length``, the logits included and the look-up of embeddings not."""
    layers = sum(MIXERS[name](config, length) + gated_mlp(config) for name in config.layers)
    return layers + 2 * config.width * config.vocab_size


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward and backward."""
    return FORWARD_AND_BACKWARD * forward_flops_per_token(config, length)
