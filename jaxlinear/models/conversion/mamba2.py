"""Mamba-2 (arXiv:2405.21060) as transformers has it, and flash-linear-attention with other fields: its one input projection
and its one convolution are several here."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.conversion.family import Family, Fields, renamed, require
from jaxlinear.models.conversion.links import TAPS, TRANSPOSED, Link, shifted
from jaxlinear.models.mixers.mamba2 import widths
from jaxlinear.streaming import StreamedArray

_LOG = logging.getLogger(__name__)


def _model(fields: Fields) -> dict[str, Any]:
    width, heads, head_width = fields.integer("hidden_size"), fields.integer("num_heads"), fields.integer("head_dim")
    inner = int(fields.integer("expand", 2) * width)
    if heads * head_width != inner:
        fields.refuse("num_heads", heads, f"with head_dim {head_width} it does not give expand * hidden_size = {inner}")
    fields.only("n_groups", 1, default=8)
    fields.only("use_bias", False, default=False)
    fields.only("use_conv_bias", True, default=True)
    fields.only("hidden_act", "silu", default="silu")
    for name in ("time_step_limit", "dt_limit"):
        limit = fields.get(name, [0.0, float("inf")])
        if limit != [0.0, float("inf")]:
            fields.refuse(name, limit, "only time steps without a limit can be imported")
    fields.only("rmsnorm", True, default=True)
    for name in ("norm_before_gate", "D_has_hdim"):
        fields.only(name, False, default=False)
    if fields.boolean("residual_in_fp32", True) and fields.dtype() == "bfloat16":
        _LOG.warning(
            "%s: residual_in_fp32 is true, by which the stream between blocks is float32; here it is bfloat16, as other "
            "activations are, and logits differ by its rounding ('dtype': 'float32' there imports a model all in float32)",
            fields.origin,
        )
    return {
        "pattern": ("mamba2",),
        "num_layers": fields.integer("num_hidden_layers"),
        "vocab_size": fields.integer("vocab_size"),
        "width": width,
        "recurrent_width": inner,
        "num_heads": 1,  # of attention, which there is none
        "key_width": fields.integer("state_size"),
        "value_width": head_width,
        "channel_mixer": "none",
        "convolution_width": fields.integer("conv_kernel", 4),
        "norm_epsilon": _epsilon(fields),
        "norm_offset": 0.0,
        "tied_embeddings": fields.boolean("tie_word_embeddings", False),
        "embedding_scale": False,
        "logit_soft_cap": 0.0,
    }


def _epsilon(fields: Fields) -> float:
    """That of transformers, or of flash-linear-attention, each of which does not read the other's."""
    name, other = "layer_norm_epsilon", "norm_eps"
    epsilon = fields.number(other, fields.number(name, 1e-5))
    if fields.number(name, epsilon) != epsilon:
        fields.refuse(other, epsilon, f"{name} is {fields.number(name)}")
    return epsilon


def _fields(config: ModelConfig) -> dict[str, Any]:
    require(config, "mamba2", channel_mixer="none", embedding_scale=False, logit_soft_cap=0.0)
    heads, key_width, head_width = widths(config)
    if config.recurrent_width % config.width:
        raise UserError(
            f"model.recurrent_width={config.recurrent_width} is no multiple of model.width={config.width}; in mamba2 it is"
        )
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "expand": config.recurrent_width // config.width,
        "num_heads": heads,
        "head_dim": head_width,
        "state_size": key_width,
        "n_groups": 1,
        "conv_kernel": config.convolution_width,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_epsilon,
        "norm_eps": config.norm_epsilon,
    }


def _links(config: ModelConfig) -> Iterator[Link]:
    norm = shifted(config.norm_offset)
    yield Link("backbone.embeddings.weight", "embedding")
    yield Link("backbone.norm_f.weight", "norm.scale", None, norm)
    if not config.tied_embeddings:
        yield Link("lm_head.weight", "head")
    for layer in range(config.num_layers):
        there = f"backbone.layers.{layer}"
        yield Link(f"{there}.norm.weight", "mixer_norm.scale", layer, norm)
        there = f"{there}.mixer"
        for ours in ("gate", "value", "key", "query", "time_step"):
            yield Link(f"{there}.in_proj.weight", f"mixer.{ours}.kernel", layer, TRANSPOSED)
        for ours in ("value", "key", "query"):
            yield Link(f"{there}.conv1d.weight", f"mixer.{ours}_convolution.convolution_kernel", layer, TAPS)
            yield Link(f"{there}.conv1d.bias", f"mixer.{ours}_convolution.convolution_bias", layer)
        for name in ("A_log", "D", "dt_bias"):
            yield Link(f"{there}.{name}", f"mixer.{name}", layer)
        yield Link(f"{there}.norm.weight", "mixer.norm.scale", layer, norm)
        yield Link(f"{there}.out_proj.weight", "mixer.out.kernel", layer, TRANSPOSED)


def _read(config: ModelConfig, tensors: Mapping[str, StreamedArray]) -> dict[str, StreamedArray]:
    return renamed(tensors, {r"^backbone\.embedding\.": "backbone.embeddings."})  # in older files


FAMILY = Family("mamba2", ("mamba2",), _model, _fields, _links, read=_read)
