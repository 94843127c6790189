"""Models of flash-linear-attention (github.com/fla-org/flash-linear-attention), one file each, by their ``model_type``."""

from jaxlinear.models.conversion.fla import delta_net, gated_deltanet, gla, hgrn2, kda, retnet, transformer

FAMILIES = tuple(module.FAMILY for module in (gla, gated_deltanet, delta_net, kda, retnet, hgrn2, transformer))

__all__ = ["FAMILIES"]
