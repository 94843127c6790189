"""Gated DeltaNet (arXiv:2412.06464) as flash-linear-attention has it."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.conversion.family import Family, Fields
from jaxlinear.models.conversion.fla import shared
from jaxlinear.models.conversion.fla.releases import as_now
from jaxlinear.models.conversion.links import TRANSPOSED, Link, shifted
from jaxlinear.models.mixers.gated_delta_net import widths


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 6)
    values = shared.model(fields, "gated_delta_net", num_layers=21)
    fields.only("num_v_heads", heads, default=heads)
    fields.only("use_gate", True, default=True)
    fields.only("output_gate_activation", "swish", "silu", default="swish")
    fields.only("use_short_conv", True, default=True)
    return values | shared.delta_heads(fields, heads, head_dim=256, expand_v=2.0)


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields = shared.fields_of(config, "gated_deltanet", "GatedDeltaNetForCausalLM")
    return fields | shared.delta_fields(config, widths(config)) | {"use_gate": True}


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield from shared.delta_inputs(config, there, layer)
        yield Link(f"{there}.a_proj.weight", "mixer.decay.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.A_log", "mixer.A_log", layer)
        yield Link(f"{there}.dt_bias", "mixer.dt_bias", layer)
        yield from shared.projections(there, layer, g="gate", o="out")
        yield Link(f"{there}.o_norm.weight", "mixer.norm.scale", layer, shifted(config.norm_offset))

    return shared.links(config, own)


FAMILY = Family(
    "gated_deltanet", ("gated_delta_net", *shared.ATTENTION), _model, _fields, _links, "gated_delta_net", as_now
)
