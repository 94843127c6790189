"""Gated DeltaNet (arXiv:2412.06464) as flash-linear-attention has it."""

import math
from collections.abc import Iterator
from typing import Any

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.conversion.family import Family, Fields
from jaxlinear.models.conversion.fla import shared
from jaxlinear.models.conversion.fla.releases import as_now
from jaxlinear.models.conversion.links import TRANSPOSED, Link, shifted
from jaxlinear.models.mixers.gated_delta_net import widths


def _model(fields: Fields) -> dict[str, Any]:
    heads, key_width = fields.integer("num_heads", 6), fields.integer("head_dim", 256)
    values = shared.model(fields, "gated_delta_net", num_layers=21)
    fields.only("num_v_heads", heads, default=heads)
    fields.only("use_gate", True, default=True)
    fields.only("output_gate_activation", "swish", "silu", default="swish")
    fields.only("use_short_conv", True, default=True)
    return values | {
        "recurrent_heads": heads,
        "key_width": key_width,
        "value_width": shared.expanded(fields, "expand_v", 2.0, key_width),
        "negative_eigenvalues": fields.boolean("allow_neg_eigval", False),
        "convolution_width": fields.integer("conv_size", 4),
    }


def _fields(config: ModelConfig) -> dict[str, Any]:
    _, key_width, value_width = widths(config)
    expansion = value_width / key_width
    if int(key_width * expansion) < value_width:  # as it is multiplied there
        expansion = math.nextafter(expansion, math.inf)
    return shared.fields_of(config, "gated_deltanet", "GatedDeltaNetForCausalLM") | {
        "head_dim": key_width,
        "expand_v": expansion,
        "use_gate": True,
        "use_short_conv": True,
        "allow_neg_eigval": config.negative_eigenvalues,
        "conv_size": config.convolution_width,
    }


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield from shared.delta_inputs(there, layer)
        yield Link(f"{there}.a_proj.weight", "mixer.decay.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.A_log", "mixer.A_log", layer)
        yield Link(f"{there}.dt_bias", "mixer.dt_bias", layer)
        yield from shared.projections(there, layer, g="gate", o="out")
        yield Link(f"{there}.o_norm.weight", "mixer.norm.scale", layer, shifted(config.norm_offset))

    return shared.links(config, own)


FAMILY = Family(
    "gated_deltanet", ("gated_delta_net", *shared.ATTENTION), _model, _fields, _links, "gated_delta_net", as_now
)
