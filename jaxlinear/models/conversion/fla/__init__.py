"""Models of flash-linear-attention (github.com/fla-org/flash-linear-attention), one file each, by their ``model_type``."""

from jaxlinear.models.conversion.fla import delta_net, gated_deltanet, gla, hgrn2, retnet, transformer

FAMILIES = (gla.FAMILY, gated_deltanet.FAMILY, delta_net.FAMILY, hgrn2.FAMILY, retnet.FAMILY, transformer.FAMILY)

__all__ = ["FAMILIES"]
