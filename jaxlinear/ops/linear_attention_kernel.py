"""Linear attention by the kernels of ``jaxlinear.pallas.linear_attention``, and where they do not run."""

import dataclasses
import functools
from types import ModuleType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.ops import backends
from jaxlinear.ops.linear_attention_maps import Inputs, LinearAttentionMaps
from jaxlinear.ops.state_kernels import NARROWEST, WIDEST, StateKernels, value_pieces
from jaxlinear.pallas import blocks
from jaxlinear.pallas import linear_attention as kernels

TAKEN = {"tpu": (np.dtype(np.float32), np.dtype(jnp.bfloat16)), "gpu": (np.dtype(jnp.bfloat16),)}


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, chunk_size: int | None, platform: str) -> str | None:
    """Why the kernels do not run, or None. On other platforms they are interpreted, and run whatever these do but chunks
    that are no power of two. On GPU products of float32 would take more registers than there are."""
    least, most = blocks.CHUNKS.get(platform, blocks.CHUNKS_INTERPRETED)
    if chunk_size is not None and (chunk_size.bit_count() != 1 or not least <= chunk_size <= most):
        sizes = f"{least} tokens" if least == most else f"a power of two from {least} to {most} tokens"
        return f"the kernel takes chunks of {sizes}, not of {chunk_size}"
    if platform not in backends.COMPILED:
        return None
    taken = TAKEN[platform]
    for x in (q, k, v):
        if x.dtype not in taken:
            return f"the kernel takes {' and '.join(map(str, taken))}, not {x.dtype}"
    heads, keys, values = q.shape[2], q.shape[3], v.shape[3]
    wrong = f"K = {keys}" if not NARROWEST <= keys <= WIDEST else f"V = {values}" if values < NARROWEST else None
    if wrong:
        return f"the kernel takes K from {NARROWEST} to {WIDEST} and V from {NARROWEST} on, not {wrong}"
    pieces = value_pieces(values)
    if pieces is None:
        return f"the kernel takes V in equal parts of at most {WIDEST}, which V = {values} does not allow"
    widths = keys, values // pieces
    if platform == "tpu" and blocks.heads_of_block(heads, widths, 0) is None:
        return (
            f"the kernel takes at most {blocks.HEADS} heads together, and of {heads} heads with K, V = {widths} more are "
            "needed to fill registers of 128 lanes; multiples of 16 need fewer"
        )
    return None


@dataclasses.dataclass(frozen=True)
class LinearAttentionKernel(StateKernels, LinearAttentionMaps):
    """The family ``linear_attention.LinearAttention`` by the kernel."""

    KERNELS: ClassVar[ModuleType] = kernels

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> kernels.Inputs:
        q, k, v, log_decay, starts, _ = inputs
        narrow = functools.reduce(np.promote_types, (q.dtype, k.dtype, v.dtype))
        log_decay = log_decay if constants is None else constants
        return kernels.Inputs(q.astype(narrow), k.astype(narrow), v.astype(narrow), log_decay, starts)
