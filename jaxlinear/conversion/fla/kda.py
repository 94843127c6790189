"""Kimi Delta Attention (arXiv:2510.26692) in flash-linear-attention's format: with a bias in the gate."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion.family import Family, Fields, require
from jaxlinear.conversion.fla import shared
from jaxlinear.conversion.fla.releases import as_now
from jaxlinear.conversion.links import TRANSPOSED, Link, shifted
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixers.kda import KimiDeltaAttention


def _model(fields: Fields) -> dict[str, Any]:
    heads = fields.integer("num_heads", 16)
    values = shared.model(fields, "kda")
    fields.only("num_v_heads", heads, default=heads)
    fields.only("use_short_conv", True, default=True)
    fields.only_null("lower_bound")  # it would make the decay another function
    return values | shared.delta_heads(fields, heads, head_dim=128, expand_v=1.0) | {"gate_bias": True}


def _fields(config: ModelConfig) -> dict[str, Any]:
    require(config, "kda", gate_bias=True, householders=1)
    return shared.fields_of(config, "kda", "KDAForCausalLM") | shared.delta_fields(
        config, KimiDeltaAttention.widths(config)
    )


def _links(config: ModelConfig) -> Iterator[Link]:
    def own(there: str, layer: int) -> Iterator[Link]:
        yield from shared.delta_inputs(config, there, layer)
        for theirs, ours in (("f_proj", "decay"), ("g_proj", "gate")):
            for i, part in enumerate(("down", "up")):
                yield Link(f"{there}.{theirs}.{i}.weight", f"mixer.{ours}.{part}.kernel", layer, TRANSPOSED)
        yield Link(f"{there}.g_proj.1.bias", "mixer.gate.up.bias", layer)
        yield Link(f"{there}.A_log", "mixer.A_log", layer)
        yield Link(f"{there}.dt_bias", "mixer.dt_bias", layer)
        yield Link(f"{there}.o_norm.weight", "mixer.norm.scale", layer, shifted(config.norm_offset))
        yield from shared.projections(there, layer, o="out")

    return shared.links(config, own)


FAMILY = Family("kda", ("kda", *shared.ATTENTION), _model, _fields, _links, "kda", as_now)
