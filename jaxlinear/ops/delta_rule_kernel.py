"""The delta rule by the kernels of ``jaxlinear.pallas.delta_rule``, and when they do not run."""

import dataclasses
import functools
from types import ModuleType
from typing import ClassVar

import jax

from jaxlinear.ops import backends, dtypes, state_kernels
from jaxlinear.ops.delta_rule_maps import DeltaRuleMaps, Inputs
from jaxlinear.pallas import blocks
from jaxlinear.pallas import delta_rule as kernels

_LEAST, _MOST = 16, 128  # tokens of a chunk


def refusal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chunk_size: int | None,
    by_channel: bool,
    platform: str,
    *,
    negative_eigenvalues: bool = False,
) -> str | None:
    """``state_kernels.refusal``."""
    terms = 2 if negative_eigenvalues and state_kernels.product_bytes(q, k, v) < 4 else 1  # as the plan has them
    most = blocks.delta_rule_gpu_chunk(k.shape[3], backends.target().gpu, terms) if platform == "gpu" else _MOST
    of_heads = functools.partial(_of_heads, by_channel=by_channel, terms=terms)
    return state_kernels.refusal(q, k, v, chunk_size, platform, chunks=(_LEAST, most), of_heads=of_heads)


def _of_heads(heads: int, widths: tuple[int, int], size: int, *, by_channel: bool, terms: int) -> str | None:
    of_block = blocks.delta_rule_heads(backends.target().kind, heads, *widths)
    if of_block > blocks.DELTA_RULE_HEADS:
        return (
            f"the kernel takes at most {blocks.DELTA_RULE_HEADS} heads at a time, and {heads} heads with K, V = {widths} "
            f"need {of_block} to fill registers of 128 lanes; multiples of 16 need fewer"
        )
    block = blocks.DeltaRuleHeads(of_block, *widths, size, by_channel, terms)
    if not block.together():
        limit = f"{blocks.VMEM_BYTES >> 20} MiB of VMEM and would need about {block.vmem(1) / 2**20:.0f}"
        return f"the kernel has {limit} for {of_block} heads with K, V = {widths}"
    return None


@dataclasses.dataclass(frozen=True)
class DeltaRuleKernel(state_kernels.StateKernels, DeltaRuleMaps):
    """The family ``delta_rule.DeltaRule`` by the kernel. ``constants`` is None."""

    KERNELS: ClassVar[ModuleType] = kernels

    negative_eigenvalues: bool = False

    @property
    def _options(self) -> kernels.Options:
        return super()._options._replace(negative_eigenvalues=self.negative_eigenvalues)

    def prepare(self, inputs: Inputs, constants: None) -> kernels.Inputs:
        narrow = dtypes.narrow(inputs.q.dtype, inputs.k.dtype, inputs.v.dtype)
        q, k, v = (x.astype(narrow) for x in inputs[:3])
        return kernels.Inputs(q, k, v, *inputs[3:])
