"""DeltaNet (arXiv:2406.06484) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion.family import Family, Fields
from jaxlinear.conversion.fla import shared
from jaxlinear.conversion.fla.releases import as_now
from jaxlinear.conversion.links import Link
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixers.delta_net import DeltaNet


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 16)
    values = shared.model(fields, "delta_net")
    fields.only("use_beta", True, default=True)
    fields.only("use_short_conv", True, default=True)
    fields.only("qk_norm", "l2", default="l2")
    if fields.is_null("qk_norm"):  # in releases of 2024 this means no norm
        fields.refuse("qk_norm", None, "only 'l2' can be imported")
    for name in ("use_elu", "use_rope"):  # options of the first releases
        fields.only(name, False, default=False)
    fields.only("qk_activation", "silu", default="silu")
    values |= shared.expanded_heads(fields, heads, values["width"], expand_k=1.0, expand_v=1.0)
    return values | {
        "output_gate": shared.output_gate("delta_net", fields.boolean("use_gate", False)),
        "negative_eigenvalues": fields.boolean("allow_neg_eigval", False),
        "convolution_width": fields.integer("conv_size", 4),
    }


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields = shared.fields_of(config, "delta_net", "DeltaNetForCausalLM") | shared.expansions(
        config, DeltaNet.widths(config)
    )
    return fields | {
        "use_gate": DeltaNet.has_gate(config),
        "use_beta": True,
        "use_short_conv": True,
        "allow_neg_eigval": config.negative_eigenvalues,
        "conv_size": config.convolution_width,
        "qk_norm": "l2",
        "qk_activation": "silu",
    }


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield from shared.delta_inputs(config, there, layer)
        yield from shared.delta_output(config, "delta_net", there, layer)

    return shared.links(config, own)


FAMILY = Family("delta_net", ("delta_net", *shared.ATTENTION), _model, _fields, _links, "delta_net", as_now)
