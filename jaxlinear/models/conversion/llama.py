"""Llama (arXiv:2302.13971) as transformers has it, with grouped key and value heads."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.conversion.family import Family, Fields, require
from jaxlinear.models.conversion.links import TRANSPOSED, Link, shifted


def _model(fields: Fields) -> dict[str, Any]:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if width % heads:
        fields.refuse("hidden_size", width, f"its {heads} heads do not divide it")
    head_width = fields.integer("head_dim", width // heads)
    if head_width != width // heads:
        fields.refuse(
            "head_dim", head_width, f"only hidden_size / num_attention_heads = {width // heads} can be imported"
        )
    if head_width % 2:
        fields.refuse(
            "head_dim",
            head_width,
            f"positions turn pairs of channels: only an even number can be imported (hidden_size={width} over "
            f"num_attention_heads={heads})",
        )
    fields.only("hidden_act", "silu", default="silu")
    for name in ("attention_bias", "mlp_bias"):
        fields.only(name, False, default=False)
    base, fraction = fields.rotary(fraction=1.0)
    if fraction != 1:
        fields.refuse("partial_rotary_factor", fraction, "only positions of whole heads can be imported")
    return {
        "pattern": ("attention",),
        "num_layers": fields.integer("num_hidden_layers"),
        "vocab_size": fields.integer("vocab_size"),
        "width": width,
        "num_heads": heads,
        "key_value_heads": fields.integer("num_key_value_heads", heads),
        "context": fields.integer("max_position_embeddings", 2048),
        "channel_mixer": "gated_mlp",
        "mlp_expansion": fields.integer("intermediate_size") / width,
        "mlp_activation": "silu",
        "bias": False,
        "rotary_base": base,
        "rotary_fraction": fraction,
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "norm_offset": 0.0,
        "tied_embeddings": fields.boolean("tie_word_embeddings", False),
        "embedding_scale": False,
        "logit_soft_cap": 0.0,
    }


def _fields(config: ModelConfig) -> dict[str, Any]:
    require(config, "llama", channel_mixer="gated_mlp", mlp_activation="silu", bias=False, rotary_fraction=1.0)
    require(config, "llama", embedding_scale=False, logit_soft_cap=0.0)
    if config.head_width % 2:
        raise UserError(
            f"model.width={config.width} over model.num_heads={config.num_heads} is {config.head_width} channels a head; "
            "in llama it can only be an even number"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context,
        "rope_theta": config.rotary_base,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_epsilon,
    }


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


FAMILY = Family("llama", ("attention",), _model, _fields, _links)
