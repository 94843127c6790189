"""Llama (arXiv:2302.13971) in transformers' format, with grouped key and value heads; and Mistral (arXiv:2310.06825), which
is Llama with a window."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion.family import Family, Fields, require
from jaxlinear.conversion.links import TRANSPOSED, Link, shifted
from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig


def _llama(fields: Fields) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias"):
        fields.only(name, False, default=False)
    return _shared(fields, fields.integer("num_attention_heads")) | _full(fields, 2048)


def _mistral(fields: Fields) -> dict[str, Any]:
    shared = _shared(fields, 8)
    full = fields.is_null("sliding_window")
    kind = "full_attention" if full else "sliding_attention"
    layers = fields.optional("layer_types")
    # Where there are any, transformers takes the model for a Ministral, whose layers may differ.
    if layers not in (None, [kind] * shared["num_layers"]):
        fields.refuse("layer_types", layers, f"with this sliding_window only {kind} can be imported")
    if full:
        return shared | _full(fields, 4096 * 32)
    return shared | {"pattern": ("sliding_window",), "window": fields.integer("sliding_window", 4096)}


def _full(fields: Fields, context: int) -> dict[str, Any]:
    return {"pattern": ("attention",), "context": fields.integer("max_position_embeddings", context)}


def _shared(fields: Fields, groups: int) -> dict[str, Any]:
    """The keys of both. ``groups`` is the default number of key and value heads."""
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if width % heads:
        fields.refuse("hidden_size", width, f"the {heads} heads do not divide it")
    head_width = fields.integer("head_dim", width // heads)
    if head_width != width // heads:
        fields.refuse(
            "head_dim", head_width, f"only hidden_size / num_attention_heads = {width // heads} can be imported"
        )
    if head_width % 2:
        fields.refuse(
            "head_dim",
            head_width,
            f"rotary positions need an even number of channels per head (hidden_size={width} over "
            f"num_attention_heads={heads})",
        )
    fields.only("hidden_act", "silu", default="silu")
    fields.only("is_causal", True, default=True)
    positions = fields.rotary(fraction=1.0, may_scale=True)
    if positions["rotary_fraction"] != 1:
        fields.refuse(
            "partial_rotary_factor",
            positions["rotary_fraction"],
            "only rotary positions over whole heads can be imported",
        )
    return {
        "num_layers": fields.integer("num_hidden_layers"),
        "vocab_size": fields.integer("vocab_size"),
        "width": width,
        "num_heads": heads,
        "key_value_heads": fields.integer("num_key_value_heads", groups),
        "channel_mixer": "gated_mlp",
        "mlp_expansion": fields.integer("intermediate_size") / width,
        "mlp_activation": "silu",
        "bias": False,
        **positions,
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "norm_offset": 0.0,
        "tied_embeddings": fields.boolean("tie_word_embeddings", False),
        "embedding_scale": False,
        "logit_soft_cap": 0.0,
    }


def _fields_of_llama(config: ModelConfig) -> dict[str, Any]:
    own = {"max_position_embeddings": config.context, "attention_bias": False, "mlp_bias": False}
    return {"architectures": ["LlamaForCausalLM"], **_shared_fields(config, "llama"), **own}


def _fields_of_mistral(config: ModelConfig) -> dict[str, Any]:
    own = {"sliding_window": config.window}
    return {"architectures": ["MistralForCausalLM"], **_shared_fields(config, "mistral"), **own}


def _shared_fields(config: ModelConfig, family: str) -> dict[str, Any]:
    require(config, family, channel_mixer="gated_mlp", mlp_activation="silu", bias=False, rotary_fraction=1.0)
    require(config, family, embedding_scale=False, logit_soft_cap=0.0)
    if config.head_width % 2:
        raise UserError(
            f"model.width={config.width} over model.num_heads={config.num_heads} is {config.head_width} channels per "
            f"head; in {family} it must be an even number"
        )
    return {
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "rope_theta": config.rotary_base,
        "rope_scaling": _scaling(config) if config.rotary_scaling else None,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
    }


def _scaling(config: ModelConfig) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": config.rotary_scaling,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": config.rotary_context,
    }


def _is_mistral(config: ModelConfig) -> bool:
    """Whether a model with a window is a Mistral, not one of Griffin's all of whose blocks are local."""
    return config.mlp_activation == "silu" and not config.embedding_scale


def _links(config: ModelConfig) -> Iterator[Link]:
    norm = shifted(config.norm_offset)
    yield Link("model.embed_tokens.weight", "embedding")
    yield Link("model.norm.weight", "norm.scale", None, norm)
    if not config.tied_embeddings:
        yield Link("lm_head.weight", "head")
    for layer in range(config.num_layers):
        there = f"model.layers.{layer}"
        yield Link(f"{there}.input_layernorm.weight", "mixer_norm.scale", layer, norm)
        yield Link(f"{there}.post_attention_layernorm.weight", "mlp_norm.scale", layer, norm)
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            yield Link(f"{there}.self_attn.{theirs}_proj.weight", f"mixer.{ours}.kernel", layer, TRANSPOSED)
        for name in ("gate", "up", "down"):
            yield Link(f"{there}.mlp.{name}_proj.weight", f"mlp.{name}.kernel", layer, TRANSPOSED)


FAMILY = Family("llama", ("attention",), _llama, _fields_of_llama, _links)
MISTRAL = Family("mistral", ("sliding_window",), _mistral, _fields_of_mistral, _links, is_one=_is_mistral)
