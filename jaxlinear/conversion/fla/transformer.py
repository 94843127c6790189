"""The transformer of flash-linear-attention, "Transformer++". It is a Llama or, with a window, a Mistral under other names,
and is exported as one."""

from collections.abc import Iterator
from typing import Any

from jaxlinear.conversion import llama
from jaxlinear.conversion.family import Family, Fields
from jaxlinear.conversion.fla import shared
from jaxlinear.conversion.fla.releases import as_now
from jaxlinear.conversion.links import Link
from jaxlinear.models.config import ModelConfig


def _model(fields: Fields) -> dict[str, Any]:
    fields.only_null("attn")
    fields.only("qk_norm", False, default=False)
    heads = fields.integer("num_heads", 32)
    if fields.optional("window_size") is None:
        values = shared.model(fields, "attention")
    else:
        values = shared.model(fields, "sliding_window") | {"window": fields.integer("window_size")}
    return values | shared.attention_heads(fields, values["width"], heads)


def _links(config: ModelConfig) -> Iterator[Link]:
    return shared.links(config, lambda there, layer: iter(()))


# No mixers: no model here is exported under this name, and its fields are a Llama's or a Mistral's.
FAMILY = Family("transformer", (), _model, llama.FAMILY.fields, _links, read=as_now)
