"""Models of flash-linear-attention (github.com/fla-org/flash-linear-attention), one file per ``model_type``."""

from jaxlinear.conversion.fla import (
    delta_net,
    gated_deltanet,
    gated_deltaproduct,
    gla,
    hgrn,
    hgrn2,
    kda,
    retnet,
    transformer,
)

# A model is exported as the first family it belongs to; with several updates per token, only as DeltaProduct.
_MODULES = (gla, gated_deltaproduct, gated_deltanet, delta_net, kda, retnet, hgrn, hgrn2, transformer)
FAMILIES = tuple(module.FAMILY for module in _MODULES)

__all__ = ["FAMILIES"]
