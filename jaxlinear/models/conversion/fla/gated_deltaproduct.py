"""DeltaProduct (arXiv:2502.10297) as flash-linear-attention has it: with a decay and a gate it is Gated DeltaNet of several
updates a token, with neither DeltaNet."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.conversion.family import Family, Fields
from jaxlinear.models.conversion.fla import delta_net, gated_deltanet, shared
from jaxlinear.models.conversion.fla.releases import as_now
from jaxlinear.models.conversion.links import Link

_GATED, _PLAIN = "gated_delta_net", "delta_net"


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 6)
    decays, gate = fields.boolean("use_forget_gate", False), fields.boolean("use_output_gate", True)
    if decays != gate:
        fields.refuse("use_forget_gate", decays, f"only what use_output_gate is, here {gate}, can be imported")
    values = shared.model(fields, _GATED if gate else _PLAIN, num_layers=21)
    fields.only("use_short_conv", True, default=True)
    values |= shared.delta_heads(fields, heads, head_dim=256, expand_v=2.0)
    return values | {"householders": fields.integer("num_householder", 1)}


def _fields(config: ModelConfig) -> dict[str, Any]:
    gated = _GATED in config.pattern
    widths = (mixers.gated_delta_net if gated else mixers.delta_net).widths(config)
    fields = shared.fields_of(config, "gated_deltaproduct", "GatedDeltaProductForCausalLM")
    return (
        fields
        | shared.delta_fields(config, widths)
        | {
            "num_householder": config.householders,
            "use_forget_gate": gated,
            "use_output_gate": gated,
        }
    )


def _links(config: ModelConfig) -> Iterator[Link]:
    return (gated_deltanet if _GATED in config.pattern else delta_net).FAMILY.links(config)


def _is_one(config: ModelConfig) -> bool:
    return config.householders > 1 and len({_GATED, _PLAIN} & set(config.pattern)) == 1


FAMILY = Family(
    "gated_deltaproduct", (_GATED, _PLAIN, *shared.ATTENTION), _model, _fields, _links, read=as_now, is_one=_is_one
)
