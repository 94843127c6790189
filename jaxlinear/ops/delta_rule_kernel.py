"""The delta rule by the kernels of ``jaxlinear.pallas.delta_rule``, and where they do not run."""

import dataclasses
import functools
from types import ModuleType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.ops import backends
from jaxlinear.ops.delta_rule_maps import DeltaRuleMaps, Inputs
from jaxlinear.ops.state_kernels import NARROWEST, WIDEST, StateKernels, value_pieces
from jaxlinear.pallas import blocks
from jaxlinear.pallas import delta_rule as kernels

_CHUNKS = {"gpu": (16, 64)}  # tokens, least and most
_CHUNKS_ELSEWHERE = 16, 128
_DTYPES = {"tpu": (np.dtype(np.float32), np.dtype(jnp.bfloat16)), "gpu": (np.dtype(jnp.bfloat16),)}


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, chunk_size: int | None, platform: str) -> str | None:
    """Why the kernels do not run, or None. On other platforms they are interpreted, and run whatever these do but chunks
    that are no power of two. On GPU products of float32 would take more registers and shared memory than there are."""
    least, most = _CHUNKS.get(platform, _CHUNKS_ELSEWHERE)
    if chunk_size is not None and (chunk_size.bit_count() != 1 or not least <= chunk_size <= most):
        return f"the kernel takes chunks of a power of two from {least} to {most} tokens, not of {chunk_size}"
    if platform not in backends.COMPILED:
        return None
    taken = _DTYPES[platform]
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
    if platform == "tpu" and (together := blocks.delta_rule_heads("", heads, *widths)) > blocks.DELTA_RULE_HEADS:
        return (
            f"the kernel takes at most {blocks.DELTA_RULE_HEADS} heads together, and of {heads} heads with K, V = {widths} "
            f"{together} fill registers of 128 lanes; multiples of 16 need fewer"
        )
    return None


@dataclasses.dataclass(frozen=True)
class DeltaRuleKernel(StateKernels, DeltaRuleMaps):
    """The family ``delta_rule.DeltaRule`` by the kernel. ``constants`` is None."""

    KERNELS: ClassVar[ModuleType] = kernels

    def prepare(self, inputs: Inputs, constants: None) -> kernels.Inputs:
        narrow = functools.reduce(np.promote_types, (inputs.q.dtype, inputs.k.dtype, inputs.v.dtype))
        q, k, v = (x.astype(narrow) for x in inputs[:3])
        return kernels.Inputs(q, k, v, *inputs[3:])
