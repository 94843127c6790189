"""What models of flash-linear-attention have around their mixers: RMSNorms and a SwiGLU. In layers named by ``attn`` of
their ``config.json``, softmax attention replaces the mixer."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from jaxlinear.conversion.family import Fields, require
from jaxlinear.conversion.links import TAPS, TRANSPOSED, Link, regrouped, shifted
from jaxlinear.errors import UserError
from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig

ATTENTION = ("attention", "sliding_window")
_MULTIPLE = 256  # an MLP's inner width is rounded up to a multiple of this, unless it is given


def model(fields: Fields, mixer: str, *, num_layers: int = 24, hidden_ratio: float = 4) -> dict[str, Any]:
    """Keys of our ``model`` section, except the mixer's own. ``num_layers`` and ``hidden_ratio`` are the defaults there."""
    width, depth = fields.integer("hidden_size", 2048), fields.integer("num_hidden_layers", num_layers)
    fields.only("hidden_act", "swish", default="swish")
    fields.only_null("attnres_block_size")
    values = {
        "pattern": (mixer,),
        "num_layers": depth,
        "vocab_size": fields.integer("vocab_size", 32_000),
        "width": width,
        "num_heads": 1,  # for softmax attention, where there is none
        "channel_mixer": "gated_mlp",
        "mlp_expansion": _inner_width(fields, width, hidden_ratio) / width,
        "mlp_activation": "silu",
        "bias": False,
        "norm_epsilon": fields.number("norm_eps", 1e-6),
        "norm_offset": 0.0,
        "tied_embeddings": fields.boolean("tie_word_embeddings", False),
        "embedding_scale": False,
        "logit_soft_cap": 0.0,
    }
    layers, attention = _attention(fields, mixer, depth, width)
    if attention:
        values |= attention | {"pattern": _period(layers)}
    if "attention" in layers:
        values["context"] = fields.integer("max_position_embeddings", 2048)
    return values


def _inner_width(fields: Fields, width: int, default: float) -> int:
    """The given width, or else two thirds of ``hidden_ratio`` times the model's width, rounded up."""
    if fields.optional("intermediate_size") is not None:
        return fields.integer("intermediate_size")
    ratio = fields.number("hidden_ratio", default)
    inner = int(width * ratio * 2 / 3)
    if inner < 1:
        fields.refuse("hidden_ratio", ratio, "the MLP would have no channels")
    return math.ceil(inner / _MULTIPLE) * _MULTIPLE


def _attention(fields: Fields, mixer: str, depth: int, width: int) -> tuple[list[str], dict[str, Any]]:
    """The mixer of each layer, and the keys of softmax attention if some layers have it."""
    layers, specs = [mixer] * depth, fields.optional("attn")
    found: dict[str, Any] = {}
    for spec in specs if isinstance(specs, list) else [] if specs is None else [specs]:
        if not isinstance(spec, dict):
            fields.refuse("attn", specs, "it must be an object or a list of objects")
        entry = Fields(spec, f"{fields.origin}: attn")
        places = entry.get("layers")
        if not isinstance(places, list) or any(type(place) is not int or not 0 <= place < depth for place in places):
            entry.refuse("layers", places, f"it must be a list of layers, each 0 to {depth - 1}")
        values, window = attention_heads(entry, width, entry.integer("num_heads")), entry.optional("window_size")
        if window is not None:
            values["window"] = entry.integer("window_size")
        for place in places:
            if layers[place] != mixer:
                entry.refuse("layers", places, f"layer {place} is listed twice")
            layers[place] = "attention" if window is None else "sliding_window"
        for name, value in values.items() if places else ():
            if found.setdefault(name, value) != value:
                fields.refuse("attn", specs, "only layers with the same heads, positions and window can be imported")
    if mixer not in layers:
        fields.refuse("attn", specs, "at least one layer must not be softmax attention")
    return layers, found


def attention_heads(fields: Fields, width: int, heads: int) -> dict[str, Any]:
    """Keys of softmax attention, from its fields in a model or in an entry of ``attn``."""
    if width % heads or width // heads % 2:
        fields.refuse(
            "num_heads",
            heads,
            f"hidden_size={width} must split into that many heads, each with an even number of channels",
        )
    fields.only("qkv_bias", False, default=False)
    return {
        "num_heads": heads,
        "key_value_heads": fields.integer("num_kv_heads", heads),
        "rotary_base": fields.number("rope_theta", 10_000.0),
        "rotary_fraction": 1.0,
    }


def _period(layers: list[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these layers when repeated to the depth."""
    depth = len(layers)
    period = next(n for n in range(1, depth + 1) if all(layers[i] == layers[i % n] for i in range(depth)))
    return tuple(layers[:period])


def expanded(fields: Fields, name: str, default: float, channels: int) -> int:
    """A width that is given as a multiple of ``channels``."""
    factor = fields.number(name, default)
    width = round(channels * factor)
    if width < 1 or not math.isclose(channels * factor, width):
        fields.refuse(name, factor, f"that is {channels * factor} channels")
    return width


def expansion(width: int, channels: int) -> float:
    """The inverse: a factor such that ``channels`` times it, rounded down as it is there, is the width."""
    factor = width / channels
    return math.nextafter(factor, math.inf) if int(channels * factor) < width else factor


def expanded_heads(fields: Fields, heads: int, width: int, **defaults: float) -> dict[str, Any]:
    """Keys of ``heads`` heads whose total channels ``expand_k`` and ``expand_v`` give as multiples of the width."""
    values: dict[str, Any] = {"recurrent_heads": heads}
    for ours, theirs in (("key_width", "expand_k"), ("value_width", "expand_v")):
        values[ours] = per_head(fields, theirs, expanded(fields, theirs, defaults[theirs], width), heads)
    return values


def expansions(config: ModelConfig, widths: tuple[int, int, int]) -> dict[str, float]:
    """The inverse, from H, K and V."""
    heads, key_width, value_width = widths
    return {
        "expand_k": expansion(heads * key_width, config.width),
        "expand_v": expansion(heads * value_width, config.width),
    }


def per_head(fields: Fields, name: str, channels: int, heads: int) -> int:
    """Channels per head, given the total ``channels`` that the field ``name`` implies."""
    if channels % heads:
        fields.refuse(name, fields.optional(name), f"that is {channels} channels, which {heads} heads do not divide")
    return channels // heads


def fields_of(config: ModelConfig, family: str, architecture: str) -> dict[str, Any]:
    """The inverse of ``model``; raises ``UserError`` if a model is not one of theirs."""
    require(config, family, channel_mixer="gated_mlp", mlp_activation="silu", bias=False)
    require(config, family, embedding_scale=False, logit_soft_cap=0.0)
    specs = [_spec(config, family, name) for name in ATTENTION if name in config.layers]
    context = {"max_position_embeddings": config.context} if "attention" in config.layers else {}
    return context | {
        "architectures": [architecture],
        "num_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "swish",
        "norm_eps": config.norm_epsilon,
        "attn": specs[0] if len(specs) == 1 else specs or None,
        "fuse_norm": True,
    }


def _spec(config: ModelConfig, family: str, mixer: str) -> dict[str, Any]:
    require(config, family, rotary_fraction=1.0, rotary_scaling=0.0)
    if config.head_width % 2:
        raise UserError(
            f"model.width={config.width} over model.num_heads={config.num_heads} is {config.head_width} channels per "
            f"attention head; in {family} it must be an even number"
        )
    return {
        "layers": [layer for layer, name in enumerate(config.layers) if name == mixer],
        "num_heads": config.num_heads,
        "num_kv_heads": config.key_value_heads,
        "qkv_bias": False,
        "window_size": config.window if mixer == "sliding_window" else None,
        "rope_theta": config.rotary_base,
    }


def links(config: ModelConfig, own: Callable[[str, int], Iterator[Link]]) -> Iterator[Link]:
    """The links of a model. ``own`` gives those of its mixer, from the prefix of its tensors' names and its layer."""
    norm = shifted(config.norm_offset)
    yield Link("model.embeddings.weight", "embedding")
    yield Link("model.norm.weight", "norm.scale", None, norm)
    if not config.tied_embeddings:
        yield Link("lm_head.weight", "head")
    for layer, mixer in enumerate(config.layers):
        there = f"model.layers.{layer}"
        yield Link(f"{there}.attn_norm.weight", "mixer_norm.scale", layer, norm)
        yield Link(f"{there}.mlp_norm.weight", "mlp_norm.scale", layer, norm)
        for name in ("gate", "up", "down"):
            yield Link(f"{there}.mlp.{name}_proj.weight", f"mlp.{name}.kernel", layer, TRANSPOSED)
        there = f"{there}.attn"
        if mixer in ATTENTION:
            yield from projections(there, layer, q="query", k="key", v="value", o="out")
        else:
            yield from own(there, layer)


def projections(there: str, layer: int, **names: str) -> Iterator[Link]:
    """Linear maps without biases, from their letter there to their name in our mixer."""
    for letter, name in names.items():
        yield Link(f"{there}.{letter}_proj.weight", f"mixer.{name}.kernel", layer, TRANSPOSED)


def delta_inputs(config: ModelConfig, there: str, layer: int) -> Iterator[Link]:
    """The inputs of the delta rule in each of its models. There the heads of an update are contiguous; here the updates of
    a head are."""
    yield from projections(there, layer, q="inputs.query")
    for letter, name in (("k", "key"), ("v", "value"), ("b", "beta")):
        form = regrouped(config.householders, config.heads, TRANSPOSED)
        yield Link(f"{there}.{letter}_proj.weight", f"mixer.inputs.{name}.kernel", layer, form)
    for letter, name, updates in (
        ("q", "query", 1),
        ("k", "key", config.householders),
        ("v", "value", config.householders),
    ):
        ours = f"mixer.inputs.{name}_convolution.convolution_kernel"
        yield Link(f"{there}.{letter}_conv1d.weight", ours, layer, regrouped(updates, config.heads, TAPS))


def delta_output(config: ModelConfig, mixer: str, there: str, layer: int) -> Iterator[Link]:
    """Gate, norm and output of ``delta_net`` and ``gated_delta_net``."""
    gate = {"g": "gate"} if mixers.find(mixer).has_gate(config) else {}
    yield from projections(there, layer, **gate, o="out")
    yield Link(f"{there}.o_norm.weight", "mixer.norm.scale", layer, shifted(config.norm_offset))


def output_gate(mixer: str, gate: bool) -> str:
    """``model.output_gate`` for one of these mixers, with or without a gate."""
    given = "silu" if gate else "none"
    return "auto" if given == mixers.find(mixer).OWN_GATE else given


def delta_heads(fields: Fields, heads: int, *, head_dim: int, expand_v: float) -> dict[str, Any]:
    """Keys of a gated delta rule's heads. ``head_dim`` and ``expand_v`` are the defaults there."""
    key_width = fields.integer("head_dim", head_dim)
    return {
        "recurrent_heads": heads,
        "key_width": key_width,
        "value_width": expanded(fields, "expand_v", expand_v, key_width),
        "negative_eigenvalues": fields.boolean("allow_neg_eigval", False),
        "convolution_width": fields.integer("conv_size", 4),
    }


def delta_fields(config: ModelConfig, widths: tuple[int, int, int]) -> dict[str, Any]:
    """The inverse, from H, K and V."""
    _, key_width, value_width = widths
    return {
        "head_dim": key_width,
        "expand_v": expansion(value_width, key_width),
        "use_short_conv": True,
        "allow_neg_eigval": config.negative_eigenvalues,
        "conv_size": config.convolution_width,
    }
