"""Linear attention by the kernels of ``jaxlinear.pallas.linear_attention``, and when they do not run."""

import dataclasses
from types import ModuleType
from typing import ClassVar

import jax

from jaxlinear.ops import dtypes, state_kernels
from jaxlinear.ops.linear_attention_maps import Inputs, LinearAttentionMaps
from jaxlinear.pallas import blocks
from jaxlinear.pallas import linear_attention as kernels


def refusal(
    q: jax.Array, k: jax.Array, v: jax.Array, chunk_size: int | None, by_channel: bool, platform: str
) -> str | None:
    """``state_kernels.refusal``; it is the same for every decay."""
    chunks = blocks.CHUNKS.get(platform, blocks.CHUNKS_INTERPRETED)
    return state_kernels.refusal(q, k, v, chunk_size, platform, chunks=chunks, of_heads=_of_heads)


def _of_heads(heads: int, widths: tuple[int, ...], size: int) -> str | None:
    if blocks.heads_of_block(heads, widths, 0) is not None:
        return None
    named = f"K, V = {widths}" if len(widths) > 1 else f"V = {widths[0]}"
    return (
        f"the kernel takes at most {blocks.HEADS} heads at a time, and {heads} heads with {named} need more to fill "
        "registers of 128 lanes; multiples of 16 need fewer"
    )


@dataclasses.dataclass(frozen=True)
class LinearAttentionKernel(state_kernels.StateKernels, LinearAttentionMaps):
    """The family ``linear_attention.LinearAttention`` by the kernel."""

    KERNELS: ClassVar[ModuleType] = kernels

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> kernels.Inputs:
        q, k, v, log_decay, starts, _ = inputs
        narrow = dtypes.narrow(q.dtype, k.dtype, v.dtype)
        log_decay = log_decay if constants is None else constants
        return kernels.Inputs(q.astype(narrow), k.astype(narrow), v.astype(narrow), log_decay, starts)
