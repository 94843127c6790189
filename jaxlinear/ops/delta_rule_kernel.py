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
from jaxlinear.ops.state_kernels import StateKernels
from jaxlinear.pallas import blocks
from jaxlinear.pallas import delta_rule as kernels

_WIDTHS = 16, 256  # of K and V
_CHUNKS = 16, 128  # tokens


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, chunk_size: int | None, platform: str) -> str | None:
    """Why the kernels do not run, or None. On other platforms they are interpreted, and run whatever these do but chunks
    that are no power of two."""
    least, most = _CHUNKS
    if chunk_size is not None and (chunk_size.bit_count() != 1 or not least <= chunk_size <= most):
        return f"the kernel takes chunks of a power of two from {least} to {most} tokens, not of {chunk_size}"
    if platform not in backends.COMPILED:
        return None
    for x in (q, k, v):
        if x.dtype not in (np.dtype(np.float32), np.dtype(jnp.bfloat16)):
            return f"the kernel takes float32 and bfloat16, not {x.dtype}"
    heads, widths = q.shape[2], (q.shape[3], v.shape[3])
    for name, width in zip(("K", "V"), widths, strict=True):
        if not _WIDTHS[0] <= width <= _WIDTHS[1]:
            return f"the kernel takes K and V from {_WIDTHS[0]} to {_WIDTHS[1]}, not {name} = {width}"
    if platform == "gpu":
        return "the kernel is for TPU"
    if (together := blocks.delta_rule_heads("", heads, *widths)) > blocks.DELTA_RULE_HEADS:
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
