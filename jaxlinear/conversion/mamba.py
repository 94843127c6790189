"""Mamba (arXiv:2312.00752) in the formats of transformers and, with other fields, flash-linear-attention; and what
Falcon-Mamba and Mamba-2 share with it."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlinear.conversion.family import Family, Fields, renamed, require
from jaxlinear.conversion.links import TAPS, TRANSPOSED, Link, shifted
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixers.mamba import Mamba, paper_rank
from jaxlinear.streaming import StreamedArray

_LOG = logging.getLogger(__name__)


def model(fields: Fields) -> dict[str, Any]:
    """Keys of our ``model`` section; for Falcon-Mamba too, except for its norms."""
    values = shared_model(fields, "mamba", tied_by_default=True)
    # Both programs use it rather than ``expand``, which may disagree, as in the published Falcon-Mamba.
    inner = fields.integer("intermediate_size", values["recurrent_width"])
    return values | {"recurrent_width": inner, "time_step_rank": _rank(fields, values["width"])}


def _rank(fields: Fields, width: int) -> int:
    """The rank in transformers or flash-linear-attention; 0, as in the presets, if it is the usual one."""
    name, other = "time_step_rank", "dt_rank"
    ranks = {key: fields.integer(key) for key in (name, other) if fields.get(key, "auto") != "auto"}
    rank = ranks.get(name, ranks.get(other, paper_rank(width)))
    if ranks.get(other, rank) != rank:
        fields.refuse(other, ranks[other], f"{name} is {rank}")
    return 0 if rank == paper_rank(width) else rank


def shared_model(fields: Fields, mixer: str, *, tied_by_default: bool) -> dict[str, Any]:
    """The keys that any Mamba has."""
    width = fields.integer("hidden_size")
    fields.only("use_bias", False, default=False)
    fields.only("use_conv_bias", True, default=True)
    fields.only("hidden_act", "silu", default="silu")
    if fields.boolean("residual_in_fp32", True) and fields.dtype() == "bfloat16":
        _LOG.warning(
            "%s: residual_in_fp32 is true, which keeps the residual stream in float32; here it is bfloat16 like other "
            "activations, and the logits differ by its rounding (set 'dtype': 'float32' there to import a model all "
            "in float32)",
            fields.origin,
        )
    return {
        "pattern": (mixer,),
        "num_layers": fields.integer("num_hidden_layers"),
        "vocab_size": fields.integer("vocab_size"),
        "width": width,
        "recurrent_width": int(fields.integer("expand", 2) * width),
        "num_heads": 1,  # for attention, of which there is none
        "key_width": fields.integer("state_size"),
        "channel_mixer": "none",
        "convolution_width": fields.integer("conv_kernel", 4),
        "norm_epsilon": _epsilon(fields),
        "norm_offset": 0.0,
        "tied_embeddings": fields.boolean("tie_word_embeddings", tied_by_default),
        "embedding_scale": False,
        "logit_soft_cap": 0.0,
    }


def _epsilon(fields: Fields) -> float:
    """The epsilon of transformers or of flash-linear-attention. Neither reads the other's field."""
    name, other = "layer_norm_epsilon", "norm_eps"
    epsilon = fields.number(other, fields.number(name, 1e-5))
    if fields.number(name, epsilon) != epsilon:
        fields.refuse(other, epsilon, f"{name} is {fields.number(name)}")
    return epsilon


def _fields(config: ModelConfig) -> dict[str, Any]:
    return fields_of(config, "mamba") | {"architectures": ["MambaForCausalLM"]}


def fields_of(config: ModelConfig, family: str) -> dict[str, Any]:
    """The inverse of ``model``."""
    states, rank = Mamba.widths(config)
    return shared_fields(config, family) | {
        "state_size": states,
        "intermediate_size": config.recurrent_width,
        "time_step_rank": rank,
        "dt_rank": rank,
    }


def shared_fields(config: ModelConfig, family: str) -> dict[str, Any]:
    """The inverse of ``shared_model``."""
    require(config, family, channel_mixer="none", embedding_scale=False, logit_soft_cap=0.0)
    return {
        "expand": max(1, config.recurrent_width // config.width),  # transformers requires an integer
        "conv_kernel": config.convolution_width,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_epsilon,
        "norm_eps": config.norm_epsilon,
    }


def links(config: ModelConfig) -> Iterator[Link]:
    """The links, for Falcon-Mamba too."""
    yield from links_around(config)
    for layer in range(config.num_layers):
        there = f"backbone.layers.{layer}.mixer"
        for ours in ("value", "gate"):
            yield Link(f"{there}.in_proj.weight", f"mixer.{ours}.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.conv1d.weight", "mixer.value_convolution.convolution_kernel", layer, TAPS)
        yield Link(f"{there}.conv1d.bias", "mixer.value_convolution.convolution_bias", layer)
        yield Link(f"{there}.x_proj.weight", "mixer.selection.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.dt_proj.weight", "mixer.time_step.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.dt_proj.bias", "mixer.dt_bias", layer)
        for name in ("A_log", "D"):
            yield Link(f"{there}.{name}", f"mixer.{name}", layer)
        yield Link(f"{there}.out_proj.weight", "mixer.out.kernel", layer, TRANSPOSED)


def links_around(config: ModelConfig) -> Iterator[Link]:
    """The links of everything but the mixers."""
    norm = shifted(config.norm_offset)
    yield Link("backbone.embeddings.weight", "embedding")
    yield Link("backbone.norm_f.weight", "norm.scale", None, norm)
    if not config.tied_embeddings:
        yield Link("lm_head.weight", "head")
    for layer in range(config.num_layers):
        yield Link(f"backbone.layers.{layer}.norm.weight", "mixer_norm.scale", layer, norm)


def read(config: ModelConfig, tensors: Mapping[str, StreamedArray]) -> dict[str, StreamedArray]:
    return renamed(tensors, {r"^backbone\.embedding\.": "backbone.embeddings."})  # in older files


def _is_one(config: ModelConfig) -> bool:
    return not config.selection_norm


FAMILY = Family("mamba", ("mamba",), model, _fields, links, read=read, is_one=_is_one)
