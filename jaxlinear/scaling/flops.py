"""FLOPs of a model, by an explicit formula for each kind of layer.

The formulas count the multiplications and additions of every matrix product and recurrence (a multiply-add is 2) in the
forward pass. The backward pass costs twice that. Recomputation is not counted (it is the program's choice, not the
model's). Norms, activations and the optimiser are left out: less than 1% at any size worth a formula.
"""

from collections.abc import Callable

from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig

FORWARD_AND_BACKWARD = 3


def rg_lru(config: ModelConfig, length: int) -> float:
    """Three projections D x R, two block-diagonal gates, the convolution, and the recurrence (2 for h, 3 for its input)."""
    d, r = config.width, config.recurrent_width
    gates = 2 * 2 * r * r // config.gate_blocks
    return 3 * 2 * d * r + gates + 2 * config.convolution_width * r + 5 * r


def sliding_window(config: ModelConfig, length: int) -> float:
    """As ``attention``, but a token sees only the window."""
    return _attention(config, mean_context(length, config.window))


def attention(config: ModelConfig, length: int) -> float:
    """Queries and outputs D x D, keys and values D x G K, and the products with the visible tokens."""
    return _attention(config, mean_context(length, length))


def _attention(config: ModelConfig, seen: float) -> float:
    d, h, k = config.width, config.num_heads, config.head_width
    return 2 * 2 * d * h * k + 2 * 2 * d * config.key_value_heads * k + 2 * 2 * h * k * seen


def convolution(config: ModelConfig, length: int) -> float:
    """Three projections D x R and the convolution."""
    d, r = config.width, config.recurrent_width
    return 3 * 2 * d * r + 2 * config.convolution_width * r


def mamba2(config: ModelConfig, length: int) -> float:
    """Projections D x (2 R + 2 N + H) and R x D, the convolution over R + 2 N channels, the update and the read of the
    state (2 N P each per head, decays left out), and the skip."""
    d, r, w = config.width, config.recurrent_width, config.convolution_width
    h, n, p = mixers.mamba2.widths(config)
    return 2 * d * (3 * r + 2 * n + h) + 2 * w * (r + 2 * n) + 2 * 2 * h * n * p + 2 * r


def mamba(config: ModelConfig, length: int) -> float:
    """Projections D x 2 R and R x D, those of the selection, R x (rank + 2 N) and rank x R, and the convolution; for each
    number of the state its decay (1), update (3) and read (2); and for each channel dt x and the skip."""
    d, r, w = config.width, config.recurrent_width, config.convolution_width
    n, rank = mixers.mamba.widths(config)
    return 2 * d * 3 * r + 2 * r * (2 * rank + 2 * n) + 2 * w * r + 6 * r * n + 3 * r


def longhorn(config: ModelConfig, length: int) -> float:
    """As Mamba, plus for each number of the state what it keeps (2 instead of 1), |k|^2 per token and dt per channel."""
    r, (n, _) = config.recurrent_width, mixers.mamba.widths(config)
    return mamba(config, length) + r * n + 2 * n + 3 * r


def delta_net(config: ModelConfig, length: int) -> float:
    """``_delta_output`` and ``_delta_rule``."""
    h, k, v = mixers.delta_net.widths(config)
    return _delta_output(config, "delta_net", h, v) + _delta_rule(config, h, k, v)


def gated_delta_net(config: ModelConfig, length: int) -> float:
    """As DeltaNet, plus the projection of the decay, D x H."""
    h, k, v = mixers.gated_delta_net.widths(config)
    return 2 * config.width * h + _delta_output(config, "gated_delta_net", h, v) + _delta_rule(config, h, k, v)


def kda(config: ModelConfig, length: int) -> float:
    """The projection H V x D, ``_delta_rule``, and two maps of rank V, to the decays, H K, and to the gate, H V."""
    h, k, v = mixers.kda.widths(config)
    low_rank = 2 * v * (2 * config.width + h * k + h * v)
    return 2 * config.width * h * v + low_rank + _delta_rule(config, h, k, v)


def _delta_output(config: ModelConfig, mixer: str, h: int, v: int) -> float:
    """The projection H V x D, and that of a gate, D x H V."""
    return 2 * config.width * h * v * (1 + mixers.delta_net.has_gate(config, mixer))


def _delta_rule(config: ModelConfig, h: int, k: int, v: int) -> float:
    """For J updates, projections D x H (K + J (K + V + 1)) and the convolutions of q, k and v. For each head, the read at
    the query (2 K V, decays left out). For each update, the read at the key, the write that replaces what was read (2 K V
    each), and the difference that is written (2 V)."""
    updates = config.householders
    channels = h * (k + updates * (k + v))
    inputs = 2 * config.width * (channels + h * updates) + 2 * config.convolution_width * channels
    return inputs + h * (2 * k * v + updates * (2 * 2 * k * v + 2 * v))


def lru(config: ModelConfig, length: int) -> float:
    """B, D x R, and the real part of C, R x D, both complex; the gated unit D x 2 D; for each state a complex product and
    sum (8); and the skip."""
    d, r = config.width, config.recurrent_width
    return 2 * 2 * 2 * d * r + 2 * 2 * d * d + 8 * r + 2 * d


def s5(config: ModelConfig, length: int) -> float:
    """As the LRU with R / 2 states, plus a gate D x D."""
    d, r = config.width, config.recurrent_width
    return 2 * 2 * d * r + 2 * d * d + 4 * r + 2 * d


def gateloop(config: ModelConfig, length: int) -> float:
    """Seven projections D x R; for each channel the transition from its magnitude and phase (2), k v, a complex product
    with the state to which it is added (7), and the real part of its product with q (1)."""
    d, r = config.width, config.recurrent_width
    return 7 * 2 * d * r + 11 * r


def gla(config: ModelConfig, length: int) -> float:
    """Queries and keys D x H K, values, gate and output D x H V, the decay's two maps of rank 16, and
    ``_linear_attention``."""
    h, k, v = mixers.gla.widths(config)
    low_rank = 2 * mixers.gla.GATE_RANK * (config.width + h * k)
    return 2 * config.width * h * (2 * k + 3 * v) + low_rank + _linear_attention(h, k, v)


def hgrn(config: ModelConfig, length: int) -> float:
    """Four projections D x R; for each channel the gate above its bound, what it leaves of the state, and the input times
    that (1 each), and the recurrence (2)."""
    d, r = config.width, config.recurrent_width
    return 4 * 2 * d * r + 5 * r


def hgrn2(config: ModelConfig, length: int) -> float:
    """Queries and forget gates D x H K, values and output D x H V, and ``_linear_attention``."""
    h, k, v = mixers.hgrn2.widths(config)
    return 2 * config.width * h * (2 * k + 2 * v) + _linear_attention(h, k, v)


def lightning(config: ModelConfig, length: int) -> float:
    """Queries and keys D x H K, values, gate and output D x H V, and ``_linear_attention``."""
    h, k, v = mixers.lightning.widths(config)
    return 2 * config.width * h * (2 * k + 3 * v) + _linear_attention(h, k, v)


def linear_attention(config: ModelConfig, length: int) -> float:
    """Queries and keys D x H K, values and output D x H V, Hedgehog's maps K x K of queries and keys in each head, and
    ``_linear_attention`` of the features, with one more value channel unless the map is the identity; no decay."""
    h, k, v = mixers.linear_attention.widths(config)
    features = mixers.linear_attention.features(config.feature_map, k)
    maps = 2 * 2 * h * k * k if config.feature_map == "hedgehog" else 0
    values = v if config.feature_map == "identity" else v + 1
    return 2 * config.width * h * (2 * k + 2 * v) + maps + _linear_attention(h, features, values, decays=False)


def retention(config: ModelConfig, length: int) -> float:
    """Queries and keys D x H K, values, gate and output D x H V, and ``_linear_attention``."""
    h, k, v = mixers.retention.widths(config)
    return 2 * config.width * h * (2 * k + 3 * v) + _linear_attention(h, k, v)


def _linear_attention(h: int, k: int, v: int, decays: bool = True) -> float:
    """For each head: the product that is added to the state and the read at the query (2 K V each), and the decay (K V).
    This is the recurrence's cost; the additional work of the chunked form is not counted."""
    return h * k * v * (5 if decays else 4)


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


MIXERS: dict[str, Callable[[ModelConfig, int], float]] = {
    "attention": attention,
    "convolution": convolution,
    "delta_net": delta_net,
    "gated_delta_net": gated_delta_net,
    "gateloop": gateloop,
    "gla": gla,
    "hgrn": hgrn,
    "hgrn2": hgrn2,
    "kda": kda,
    "lightning": lightning,
    "linear_attention": linear_attention,
    "longhorn": longhorn,
    "lru": lru,
    "mamba": mamba,
    "mamba2": mamba2,
    "retention": retention,
    "rg_lru": rg_lru,
    "s5": s5,
    "sliding_window": sliding_window,
}


def mean_context(length: int, window: int) -> float:
    """The number of tokens that a query sees, averaged over ``length`` positions: min(t, window) for t = 1 .. length."""
    window = min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops_per_token(config: ModelConfig, length: int, *, logits: bool = True) -> float:
    """FLOPs of one token in a sequence of ``length``, without the embedding look-up; the logits are optional."""
    channel_mixer = CHANNEL_MIXERS[config.channel_mixer]
    layers = sum(_of_mixer(name)(config, length) + channel_mixer(config) for name in config.layers)
    return layers + (2 * config.width * config.vocab_size if logits else 0)


def _of_mixer(name: str) -> Callable[[ModelConfig, int], float]:
    return MIXERS[name] if name in MIXERS else mixers.find(name).flops


def training_flops_per_token(config: ModelConfig, length: int, *, logits: bool = True) -> float:
    """FLOPs per token, forward and backward."""
    return FORWARD_AND_BACKWARD * forward_flops_per_token(config, length, logits=logits)
