"""DeltaProduct (arXiv:2502.10297) in flash-linear-attention's format: with a decay it is Gated DeltaNet with several
updates per token, without one it is DeltaNet."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion.family import Family, Fields
from jaxlinear.conversion.fla import delta_net, gated_deltanet, shared
from jaxlinear.conversion.fla.releases import as_now
from jaxlinear.conversion.links import Link
from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig

_GATED, _PLAIN = "gated_delta_net", "delta_net"


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 6)
    mixer = _GATED if fields.boolean("use_forget_gate", False) else _PLAIN
    values = shared.model(fields, mixer, num_layers=21)
    fields.only("use_short_conv", True, default=True)
    values |= shared.delta_heads(fields, heads, head_dim=256, expand_v=2.0)
    return values | {
        "output_gate": shared.output_gate(mixer, fields.boolean("use_output_gate", True)),
        "householders": fields.integer("num_householder", 1),
    }


def _fields(config: ModelConfig) -> dict[str, Any]:
    decays = _GATED in config.layers
    mixer = mixers.find(_GATED if decays else _PLAIN)
    fields = shared.fields_of(config, "gated_deltaproduct", "GatedDeltaProductForCausalLM")
    return (
        fields
        | shared.delta_fields(config, mixer.widths(config))
        | {
            "num_householder": config.householders,
            "use_forget_gate": decays,
            "use_output_gate": mixer.has_gate(config),
        }
    )


def _links(config: ModelConfig) -> Iterator[Link]:
    return (gated_deltanet if _GATED in config.layers else delta_net).FAMILY.links(config)


def _is_one(config: ModelConfig) -> bool:
    return config.householders > 1 and len({_GATED, _PLAIN} & set(config.layers)) == 1


FAMILY = Family(
    "gated_deltaproduct", (_GATED, _PLAIN, *shared.ATTENTION), _model, _fields, _links, read=as_now, is_one=_is_one
)
