"""Differences between the files of flash-linear-attention's 2024 releases and its present ones that mean the same."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from jaxlinear.conversion.family import renamed
from jaxlinear.models.config import ModelConfig
from jaxlinear.streaming import StreamedArray

# The norms of a block could belong to its layer and its MLP (``norm_first``).
_NORMS = {r"\.(attn|mlp)\.norm\.weight$": r".\1_norm.weight"}
# If the norm and the gate after it are two steps (``fuse_norm`` false), the norm's weight has another name.
GATED_NORM = {r"\.attn\.g_norm\.weight$": ".attn.g_norm_swish_gate.weight"}
# Gated DeltaNet had Mamba-2's D, which was never read.
_UNREAD = re.compile(r"model\.layers\.\d+\.attn\.D")
_GATE = re.compile(r"(model\.layers\.\d+\.mlp)\.gate_proj\.weight")


def as_now(
    config: ModelConfig, tensors: Mapping[str, StreamedArray], names: Mapping[str, str] = MappingProxyType({})
) -> dict[str, StreamedArray]:
    """The tensors of a file under the names of a present release. ``names`` maps regular expressions for parts of the
    model's own names to the present parts."""
    found = renamed({name: x for name, x in tensors.items() if not _UNREAD.fullmatch(name)}, {**_NORMS, **names})
    for name, x in tuple(found.items()):
        match = _GATE.fullmatch(name)
        if match and x.shape == (2 * config.mlp_width, config.width):  # the MLP's two input maps used to be one tensor
            up = f"{match[1]}.up_proj.weight"
            if up not in found:
                found[name], found[up] = _rows(x, 0, config.mlp_width), _rows(x, config.mlp_width, 2 * config.mlp_width)
    return found


def _rows(x: StreamedArray, begin: int, end: int) -> StreamedArray:
    return StreamedArray(
        (end - begin, *x.shape[1:]), x.dtype, x.rows, lambda first, last: x.read(begin + first, begin + last)
    )
