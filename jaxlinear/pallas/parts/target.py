"""The device that a kernel is built for."""

import re
from typing import Any, NamedTuple


class GPU(NamedTuple):
    """The properties of a GPU that decide which kernels can be built for it. ``capability``: NVIDIA's compute capability,
    (9, 0) for an H100; None for other vendors' GPUs. ``shared_memory``: bytes that a block may have."""

    capability: tuple[int, int] | None
    shared_memory: int

    @property
    def ample(self) -> bool:
        """Whether it has at least as much as an A100. GPUs newer than those the compilers were tried for count as having
        less."""
        return self.shared_memory >= _AMPLE and self.capability is not None and self.capability < _UNTRIED

    @property
    def warpgroups(self) -> bool:
        """Whether products work as on an H100 or B200, with operands in shared memory. Other GPUs, including the A100, have
        them in registers, which leaves fewer."""
        return self.capability is not None and (9, 0) <= self.capability < _UNTRIED

    @property
    def blackwell(self) -> bool:
        return self.capability is not None and self.capability >= (10, 0)


_AMPLE = 163 * 2**10
_UNTRIED = 12, 0  # compute capability
# For when JAX does not report it (CUDA C++ Programming Guide, technical specifications by compute capability).
_SHARED_MEMORY = {(8, 0): 163 * 2**10, (9, 0): 227 * 2**10, (10, 0): 227 * 2**10, (10, 3): 227 * 2**10}
_LEAST = 99 * 2**10  # that any GPU from 8.0 on has: that of 8.6, 8.9 and 12.0


class Target(NamedTuple):
    """``platform``: "tpu", "gpu" or another, on which kernels are interpreted. ``kind``: JAX's name for the device.
    ``interpret``: as ``pallas_call`` takes it. ``gpu``: None if there is none, or if it was not described: kernels are then
    built as for an H100."""

    platform: str
    kind: str
    interpret: Any = False
    gpu: GPU | None = None


def gpu_of(device: Any) -> GPU | None:
    """What JAX knows about a device, present or in a topology; None if it is no GPU. ROCm and oneAPI also count as
    "gpu"."""
    if device.platform != "gpu":
        return None
    number = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    capability = None if number is None else (int(number[1]), int(number[2]))
    by_capability = _SHARED_MEMORY.get(capability, _LEAST) if capability else _LEAST
    return GPU(capability, getattr(device, "shared_memory_per_block_optin", by_capability))
