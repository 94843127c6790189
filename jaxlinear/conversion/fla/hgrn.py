"""HGRN (arXiv:2311.04823) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion.family import Family, Fields
from jaxlinear.conversion.fla import shared
from jaxlinear.conversion.fla.releases import as_now
from jaxlinear.conversion.links import Link, shifted, under
from jaxlinear.models.config import ModelConfig


def _model(fields: Fields) -> dict[str, Any]:
    # There the lower bounds' logits cover all layers, including softmax attention's, so their softmax differs from ours.
    fields.only_null("attn")
    fields.only("use_lower_bound", True, default=True)
    fields.only("use_short_conv", False, default=False)
    fields.only("elementwise_affine", True, default=True)
    values = shared.model(fields, "hgrn")
    return values | {"recurrent_width": shared.expanded(fields, "expand_ratio", 1.0, values["width"])}


def _fields(config: ModelConfig) -> dict[str, Any]:
    fields = shared.fields_of(config, "hgrn", "HGRNForCausalLM")
    del fields["num_heads"]  # HGRN has none
    return fields | {
        "expand_ratio": shared.expansion(config.recurrent_width, config.width),
        "use_lower_bound": True,
        "use_short_conv": False,
    }


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield Link("model.lower_bounds", "mixer.lower_bound", layer, under(1))
        yield from shared.projections(there, layer, i="input", f="forget", g="gate", o="out")
        yield Link(f"{there}.g_norm.weight", "mixer.norm.scale", layer, shifted(config.norm_offset))

    return shared.links(config, own)


FAMILY = Family("hgrn", ("hgrn",), _model, _fields, _links, read=as_now)
