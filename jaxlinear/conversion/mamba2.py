"""Mamba-2 (arXiv:2405.21060) in the formats of transformers and, with other fields, flash-linear-attention. Their single
input projection and single convolution are several here."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion import mamba
from jaxlinear.conversion.family import Family, Fields
from jaxlinear.conversion.links import TAPS, TRANSPOSED, Link, shifted
from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixers.mamba2 import Mamba2


def _model(fields: Fields) -> dict[str, Any]:
    values = mamba.shared_model(fields, "mamba2", tied_by_default=False)
    heads, head_width, inner = fields.integer("num_heads"), fields.integer("head_dim"), values["recurrent_width"]
    if heads * head_width != inner:
        fields.refuse(
            "num_heads", heads, f"with head_dim {head_width} the heads do not add up to expand * hidden_size = {inner}"
        )
    fields.only("n_groups", 1, default=8)
    for name in ("time_step_limit", "dt_limit"):
        limit = fields.get(name, [0.0, float("inf")])
        if limit != [0.0, float("inf")]:
            fields.refuse(name, limit, "only unlimited time steps can be imported")
    fields.only("rmsnorm", True, default=True)
    for name in ("norm_before_gate", "D_has_hdim"):
        fields.only(name, False, default=False)
    return values | {"value_width": head_width}


def _fields(config: ModelConfig) -> dict[str, Any]:
    heads, key_width, head_width = Mamba2.widths(config)
    if config.recurrent_width % config.width:
        raise UserError(
            f"model.recurrent_width={config.recurrent_width} must be a multiple of model.width={config.width} in mamba2"
        )
    return mamba.shared_fields(config, "mamba2") | {
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": heads,
        "head_dim": head_width,
        "state_size": key_width,
        "n_groups": 1,
    }


def _links(config: ModelConfig) -> Iterator[Link]:
    yield from mamba.links_around(config)
    norm = shifted(config.norm_offset)
    for layer in range(config.num_layers):
        there = f"backbone.layers.{layer}.mixer"
        for ours in ("gate", "value", "key", "query", "time_step"):
            yield Link(f"{there}.in_proj.weight", f"mixer.{ours}.kernel", layer, TRANSPOSED)
        for ours in ("value", "key", "query"):
            yield Link(f"{there}.conv1d.weight", f"mixer.{ours}_convolution.convolution_kernel", layer, TAPS)
            yield Link(f"{there}.conv1d.bias", f"mixer.{ours}_convolution.convolution_bias", layer)
        for name in ("A_log", "D", "dt_bias"):
            yield Link(f"{there}.{name}", f"mixer.{name}", layer)
        yield Link(f"{there}.norm.weight", "mixer.norm.scale", layer, norm)
        yield Link(f"{there}.out_proj.weight", "mixer.out.kernel", layer, TRANSPOSED)


FAMILY = Family("mamba2", ("mamba2",), _model, _fields, _links, read=mamba.read)
