"""Gated DeltaNet (arXiv:2412.06464) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion.family import Family, Fields
from jaxlinear.conversion.fla import shared
from jaxlinear.conversion.fla.releases import as_now
from jaxlinear.conversion.links import TRANSPOSED, Link
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixers.gated_delta_net import GatedDeltaNet


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 6)
    values = shared.model(fields, "gated_delta_net", num_layers=21)
    fields.only("num_v_heads", heads, default=heads)
    gate = fields.boolean("use_gate", True)
    if gate:
        fields.only("output_gate_activation", "swish", "silu", default="swish")
    fields.only("use_short_conv", True, default=True)
    values |= shared.delta_heads(fields, heads, head_dim=256, expand_v=2.0)
    return values | {"output_gate": shared.output_gate("gated_delta_net", gate)}


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields = shared.fields_of(config, "gated_deltanet", "GatedDeltaNetForCausalLM")
    return (
        fields
        | shared.delta_fields(config, GatedDeltaNet.widths(config))
        | {"use_gate": GatedDeltaNet.has_gate(config)}
    )


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield from shared.delta_inputs(config, there, layer)
        yield Link(f"{there}.a_proj.weight", "mixer.decay.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.A_log", "mixer.A_log", layer)
        yield Link(f"{there}.dt_bias", "mixer.dt_bias", layer)
        yield from shared.delta_output(config, "gated_delta_net", there, layer)

    return shared.links(config, own)


FAMILY = Family(
    "gated_deltanet", ("gated_delta_net", *shared.ATTENTION), _model, _fields, _links, "gated_delta_net", as_now
)
