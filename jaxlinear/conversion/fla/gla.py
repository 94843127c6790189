"""Gated linear attention (arXiv:2312.06635) in flash-linear-attention's format."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxlinear.conversion.family import Family, Fields
from jaxlinear.conversion.fla import shared
from jaxlinear.conversion.fla.releases import GATED_NORM, as_now
from jaxlinear.conversion.links import TRANSPOSED, Link, shifted
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixers.gla import GLA
from jaxlinear.streaming import StreamedArray


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 4)
    values = shared.model(fields, "gla")
    fields.only("num_kv_heads", heads, default=heads)
    fields.only("use_short_conv", False, default=False)
    fields.only("use_output_gate", True, default=True)
    fields.only("elementwise_affine", True, default=True)
    fields.only_null("feature_map", "clamp_min")
    return values | shared.expanded_heads(fields, heads, values["width"], expand_k=0.5, expand_v=1.0)


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields = shared.fields_of(config, "gla", "GLAForCausalLM") | shared.expansions(config, GLA.widths(config))
    return fields | {"use_short_conv": False, "use_output_gate": True}


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
