"""RetNet (arXiv:2307.08621) in flash-linear-attention's format: with an RMSNorm in each head."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxlinear.conversion.family import Family, Fields, require
from jaxlinear.conversion.fla import shared
from jaxlinear.conversion.fla.releases import GATED_NORM, as_now
from jaxlinear.conversion.links import Link, shifted
from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixers.retention import Retention
from jaxlinear.streaming import StreamedArray

_BASE = 10_000.0
_WIDEST = 256  # the most key channels of a head


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 8)
    values = shared.model(fields, "retention", hidden_ratio=2)
    if values.get("rotary_base", _BASE) != _BASE:
        fields.refuse(
            "attn", fields.optional("attn"), f"only rope_theta {_BASE:.0f}, that of retention, can be imported"
        )
    fields.only("num_kv_heads", heads, default=heads)
    fields.only("use_output_gate", True, default=True)
    fields.only("elementwise_affine", True, default=True)
    fields.only_null("feature_map")
    values |= shared.expanded_heads(fields, heads, values["width"], expand_k=1.0, expand_v=2.0)
    if values["key_width"] % 2:
        fields.refuse(
            "expand_k", fields.optional("expand_k"), "rotary positions need an even number of channels per head"
        )
    own = {"head_norm": "rms", "rotary_fraction": 1.0, "rotary_base": _BASE}
    return values | own


def _fields(config: ModelConfig) -> dict[str, Any]:
    require(config, "retnet", head_norm="rms", rotary_fraction=1.0, rotary_base=_BASE)
    _, key_width, _ = Retention.widths(config)
    if key_width % 2 or key_width > _WIDEST:
        raise UserError(
            f"retention has keys of {key_width} channels; in retnet it must be an even number up to {_WIDEST}"
        )
    fields = shared.fields_of(config, "retnet", "RetNetForCausalLM") | shared.expansions(
        config, Retention.widths(config)
    )
    return fields | {"use_output_gate": True}


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield from shared.projections(there, layer, q="query", k="key", v="value", g="gate", o="out")
        yield Link(f"{there}.g_norm_swish_gate.weight", "mixer.norm.scale", layer, shifted(config.norm_offset))

    return shared.links(config, own)


def _read(config: ModelConfig, tensors: Mapping[str, StreamedArray]) -> dict[str, StreamedArray]:
    return as_now(config, tensors, GATED_NORM)


FAMILY = Family("retnet", ("retention", *shared.ATTENTION), _model, _fields, _links, "retention", _read)
