"""HGRN2 (arXiv:2404.07904) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion.family import Family, Fields
from jaxlinear.conversion.fla import shared
from jaxlinear.conversion.fla.releases import as_now
from jaxlinear.conversion.links import Link, shifted, under
from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixers.hgrn2 import EXPANSION, HGRN2

_EPSILON = 1e-5  # of the norm after the recurrence, whatever ``norm_eps`` is


def _model(fields: Fields) -> dict[str, Any]:
    # There the lower bounds' logits cover all layers, including softmax attention's, so their softmax differs from ours.
    fields.only_null("attn")
    fields.only("use_lower_bound", True, default=True)
    fields.only("use_short_conv", False, default=False)
    fields.only("elementwise_affine", True, default=True)
    values = shared.model(fields, "hgrn2")
    if fields.is_null("expand_ratio"):
        heads = fields.integer("num_heads")
        head_width = shared.per_head(fields, "num_heads", values["width"], heads)
    else:  # whatever their number is said to be
        head_width = fields.integer("expand_ratio", EXPANSION)
        if values["width"] % head_width:
            fields.refuse("expand_ratio", head_width, f"it does not divide hidden_size={values['width']}")
    return values | {"key_width": head_width, "value_width": head_width, "output_norm_epsilon": _EPSILON}


def _fields(config: ModelConfig) -> dict[str, Any]:
    heads, key_width, value_width = HGRN2.widths(config)
    epsilon = config.output_norm_epsilon or config.norm_epsilon
    if epsilon != _EPSILON:
        raise UserError(
            f"the norm of hgrn2's output has the epsilon {epsilon} (model.output_norm_epsilon or, where that is 0, "
            f"model.norm_epsilon); in flash-linear-attention it must be {_EPSILON}"
        )
    if not heads * key_width == heads * value_width == config.width:
        raise UserError(
            f"{heads} heads of {key_width} and {value_width} channels (model.key_width, model.value_width) must each "
            f"add up to model.width={config.width} in hgrn2"
        )
    return shared.fields_of(config, "hgrn2", "HGRN2ForCausalLM") | {
        "num_heads": heads,
        "expand_ratio": key_width,
        "use_lower_bound": True,
        "use_short_conv": False,
    }


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield Link("model.lower_bounds", "mixer.lower_bound", layer, under(1))
        yield from shared.projections(there, layer, q="query", f="forget", i="value", o="out")
        yield Link(f"{there}.g_norm.weight", "mixer.norm.scale", layer, shifted(config.norm_offset))

    return shared.links(config, own)


FAMILY = Family("hgrn2", ("hgrn2",), _model, _fields, _links, read=as_now)
