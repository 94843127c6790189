"""Linear attention by the kernels of ``jaxlinear.pallas.linear_attention``, and when they do not run."""

import dataclasses
import functools
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
    of_heads = functools.partial(_of_heads, may_pad=_may_pad(q, k, v))
    return state_kernels.refusal(q, k, v, chunk_size, platform, chunks=chunks, of_heads=of_heads)


def padding(q: jax.Array, k: jax.Array, v: jax.Array, platform: str) -> tuple[int, int]:
    """How many channels of zeros to add to K and to V for the kernel, up to a multiple of 16: on TPU where too many heads
    would have to be in one block otherwise; on GPU where rows would not be aligned. They change no result."""
    if not _may_pad(q, k, v):
        return 0, 0
    widths = q.shape[3], v.shape[3]
    of_block = widths if q.shape[2] == v.shape[2] else widths[1:]
    if platform == "tpu":
        needed = blocks.heads_of_block(v.shape[2], of_block, 0) is None
    else:
        needed = platform == "gpu" and any(width % 8 for width in widths)
    more = [-width % 16 for width in widths] if needed else [0, 0]
    return more[0], more[1]


def _may_pad(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Only if one kernel has all of V: several may divide it otherwise than without padding."""
    return state_kernels.value_pieces(v.shape[3], state_kernels.product_bytes(q, k, v)) == 1


def _of_heads(heads: int, widths: tuple[int, ...], size: int, *, may_pad: bool) -> str | None:
    if may_pad:
        widths = tuple(width + -width % 16 for width in widths)
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
