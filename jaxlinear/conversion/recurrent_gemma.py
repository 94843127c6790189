"""RecurrentGemma (arXiv:2404.07839) in the formats of transformers and the recurrentgemma package: Griffin's layers."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion.family import Family, Fields, require
from jaxlinear.conversion.links import TAPS, TRANSPOSED, Link, by_block, shifted
from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig

_BLOCKS = {"recurrent": "rg_lru", "attention": "sliding_window"}
BLOCK_OF_MIXER = {mixer: block for block, mixer in _BLOCKS.items()}
_ACTIVATION = "gelu_pytorch_tanh"


def _model(fields: Fields) -> dict[str, Any]:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    recurrent_width = fields.integer("lru_width", width)
    if recurrent_width % heads:
        fields.refuse("lru_width", recurrent_width, f"the {heads} heads do not divide it")
    if width % heads:
        fields.refuse("hidden_size", width, f"the {heads} heads do not divide it")
    fields.only("attention_bias", False, default=False)
    fields.only("hidden_activation", _ACTIVATION, default=_ACTIVATION)
    cap = fields.number("logits_soft_cap", 30.0)
    if cap <= 0:
        fields.refuse("logits_soft_cap", cap, "it must be above 0")
    window = fields.integer("attention_window_size", 2048)
    fields.only("sliding_window", window, default=window)  # another name for it
    blocks = fields.get("block_types", ["recurrent", "recurrent", "attention"])
    if not isinstance(blocks, list) or not blocks or not all(block in tuple(_BLOCKS) for block in blocks):
        fields.refuse("block_types", blocks, f"only {' and '.join(_BLOCKS)} can be imported")
    pattern, num_layers = tuple(_BLOCKS[block] for block in blocks), fields.integer("num_hidden_layers")
    positions = fields.rotary(fraction=0.5)
    turned = int(width // heads * positions["rotary_fraction"])
    # For an odd number, transformers turns one channel more, with other frequencies, whereas ours turns one less.
    if "sliding_window" in pattern[:num_layers] and turned % 2:
        fields.refuse(
            "partial_rotary_factor",
            positions["rotary_fraction"],
            f"it rotates {turned} of the {width // heads} channels of a head (hidden_size={width} over "
            f"num_attention_heads={heads}), and this must be an even number",
        )
    return griffin(
        pattern=pattern,
        num_layers=num_layers,
        vocab_size=fields.integer("vocab_size"),
        width=width,
        recurrent_width=recurrent_width,
        num_heads=heads,
        key_value_heads=fields.integer("num_key_value_heads", heads),
        window=window,
        mlp_expansion=fields.integer("intermediate_size") // 2 / width,
        convolution_width=fields.integer("conv1d_width", 4),
        **positions,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        tied_embeddings=fields.boolean("tie_word_embeddings", True),
        embedding_scale=True,
        logit_soft_cap=cap,
    )


def griffin(**values: Any) -> dict[str, Any]:
    """Keys of the ``model`` section, including those that are the same in all of these models."""
    return {"channel_mixer": "gated_mlp", "mlp_activation": "gelu", "bias": True, "norm_offset": 1.0} | values


def require_griffin(config: ModelConfig, family: str) -> None:
    """Raises ``UserError`` if a model's layers are not those of the family, whatever their sizes."""
    require(config, family, channel_mixer="gated_mlp", mlp_activation="gelu", bias=True)
    if config.gate_blocks != config.num_heads:
        raise UserError(
            f"model.num_heads={config.num_heads} does not divide model.recurrent_width={config.recurrent_width}; in "
            f"{family} each head has its own block of the gates"
        )


def _fields(config: ModelConfig) -> dict[str, Any]:
    require_griffin(config, "recurrent_gemma")
    require(config, "recurrent_gemma", embedding_scale=True, rotary_scaling=0.0)
    if not config.logit_soft_cap:
        raise UserError("model.logit_soft_cap is 0; recurrent_gemma always has one")
    turned = int(config.head_width * config.rotary_fraction)
    if "sliding_window" in config.layers and turned % 2:
        raise UserError(
            f"model.rotary_fraction={config.rotary_fraction} rotates {turned} of the {config.head_width} channels of "
            f"a head (model.width={config.width} over model.num_heads={config.num_heads}); in recurrent_gemma this "
            "must be an even number"
        )
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "intermediate_size": 2 * config.mlp_width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_value_heads,
        "lru_width": config.recurrent_width,
        "attention_window_size": config.window,
        "conv1d_width": config.convolution_width,
        "logits_soft_cap": config.logit_soft_cap,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "partial_rotary_factor": config.rotary_fraction,
        "hidden_activation": _ACTIVATION,
        "block_types": [BLOCK_OF_MIXER[mixer] for mixer in config.pattern],
        "attention_bias": False,
    }


def _links(config: ModelConfig) -> Iterator[Link]:
    norm = shifted(config.norm_offset - 1)
    yield Link("model.embed_tokens.weight", "embedding")
    yield Link("model.final_norm.weight", "norm.scale", None, norm)
    if not config.tied_embeddings:
        yield Link("lm_head.weight", "head")
    for layer, mixer in enumerate(config.layers):
        there = f"model.layers.{layer}"
        yield Link(f"{there}.temporal_pre_norm.weight", "mixer_norm.scale", layer, norm)
        yield Link(f"{there}.channel_pre_norm.weight", "mlp_norm.scale", layer, norm)
        for theirs, ours in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            yield Link(f"{there}.mlp_block.{theirs}.weight", f"mlp.{ours}.kernel", layer, TRANSPOSED)
            yield Link(f"{there}.mlp_block.{theirs}.bias", f"mlp.{ours}.bias", layer)
        there = f"{there}.temporal_block"
        if mixer == "sliding_window":
            for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out")):
                yield Link(f"{there}.{theirs}.weight", f"mixer.{ours}.kernel", layer, TRANSPOSED)
            yield Link(f"{there}.o_proj.bias", "mixer.out.bias", layer)
            continue
        for theirs, ours in (("linear_y", "gate"), ("linear_x", "input"), ("linear_out", "out")):
            yield Link(f"{there}.{theirs}.weight", f"mixer.{ours}.kernel", layer, TRANSPOSED)
            yield Link(f"{there}.{theirs}.bias", f"mixer.{ours}.bias", layer)
        yield Link(f"{there}.conv_1d.weight", "mixer.convolution_kernel", layer, TAPS)
        yield Link(f"{there}.conv_1d.bias", "mixer.convolution_bias", layer)
        yield Link(f"{there}.rg_lru.recurrent_param", "mixer.rg_lru.decay", layer)
        for theirs, ours in (("recurrent_gate", "recurrence"), ("input_gate", "input")):
            yield Link(f"{there}.rg_lru.{theirs}_weight", f"mixer.rg_lru.{ours}_kernel", layer)
            yield Link(f"{there}.rg_lru.{theirs}_bias", f"mixer.rg_lru.{ours}_bias", layer, by_block(config.num_heads))


FAMILY = Family("recurrent_gemma", tuple(BLOCK_OF_MIXER), _model, _fields, _links)
