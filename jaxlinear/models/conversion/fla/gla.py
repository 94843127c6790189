"""Gated linear attention (arXiv:2312.06635) as flash-linear-attention has it."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.conversion.family import Family, Fields
from jaxlinear.models.conversion.fla import shared
from jaxlinear.models.conversion.fla.releases import GATED_NORM, as_now
from jaxlinear.models.conversion.links import TRANSPOSED, Link, shifted
from jaxlinear.models.mixers.gla import widths
from jaxlinear.streaming import StreamedArray


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 4)
    values = shared.model(fields, "gla")
    fields.only("num_kv_heads", heads, default=heads)
    fields.only("use_short_conv", False, default=False)
    fields.only("use_output_gate", True, default=True)
    fields.only("elementwise_affine", True, default=True)
    fields.only_null("feature_map", "clamp_min")
    for ours, theirs, default in (("key_width", "expand_k", 0.5), ("value_width", "expand_v", 1.0)):
        channels = shared.expanded(fields, theirs, default, values["width"])
        values[ours] = shared.per_head(fields, theirs, channels, heads)
    return values | {"recurrent_heads": heads}


def _fields(config: ModelConfig) -> dict[str, Any]:
    heads, key_width, value_width = widths(config)
    return shared.fields_of(config, "gla", "GLAForCausalLM") | {
        "expand_k": heads * key_width / config.width,
        "expand_v": heads * value_width / config.width,
        "use_short_conv": False,
        "use_output_gate": True,
    }


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield from shared.projections(there, layer, q="query", k="key", v="value", g="gate", o="out")
        yield Link(f"{there}.gk_proj.0.weight", "mixer.decay_in.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.gk_proj.1.weight", "mixer.decay_out.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.gk_proj.1.bias", "mixer.decay_out.bias", layer)
        yield Link(f"{there}.g_norm_swish_gate.weight", "mixer.norm.scale", layer, shifted(config.norm_offset))

    return shared.links(config, own)


def _read(config: ModelConfig, tensors: Mapping[str, StreamedArray]) -> dict[str, StreamedArray]:
    return as_now(config, tensors, GATED_NORM)


FAMILY = Family("gla", ("gla", *shared.ATTENTION), _model, _fields, _links, "gla", _read)
