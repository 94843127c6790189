"""What a kernel is built for."""

import re
from typing import Any, NamedTuple


class GPU(NamedTuple):
    """What of a GPU decides which kernels can be built for it. ``capability``: NVIDIA's compute capability, (9, 0) of an
    H100; None of other makers' GPUs. ``shared_memory``: bytes that a block may have."""

    capability: tuple[int, int] | None
    shared_memory: int

    @property
    def ample(self) -> bool:
        """Whether it is as much as an A100's. What is newer than the compilers were asked about is taken for one that has
        less."""
        return self.shared_memory >= _AMPLE and self.capability is not None and self.capability < _UNTRIED

    @property
    def warpgroups(self) -> bool:
        """Whether products are an H100's or B200's, with operands in shared memory. Those of other GPUs, an A100's too,
        have them in registers, of which fewer are left."""
        return self.capability is not None and (9, 0) <= self.capability < _UNTRIED

    @property
    def blackwell(self) -> bool:
        return self.capability is not None and self.capability >= (10, 0)


_AMPLE = 163 * 2**10
_UNTRIED = 12, 0  # compute capability
# Where JAX does not say it (CUDA C++ Programming Guide, technical specifications by compute capability).
_SHARED_MEMORY = {(8, 0): 163 * 2**10, (9, 0): 227 * 2**10, (10, 0): 227 * 2**10, (10, 3): 227 * 2**10}
_LEAST = 99 * 2**10  # of any from 8.0 on: that of 8.6, 8.9 and 12.0


class Target(NamedTuple):
    """``platform``: "tpu", "gpu" or another, where kernels are interpreted. ``kind``: JAX's name of the device.
    ``interpret``: as ``pallas_call`` takes it. ``gpu``: None where there is none, or one that nobody described, which
    kernels are built for as for an H100."""

    platform: str
    kind: str
    interpret: Any = False
    gpu: GPU | None = None


def gpu_of(device: Any) -> GPU | None:
    """What JAX knows of a device, here or of a topology; None of what is no GPU. Those of ROCm and oneAPI are "gpu" too."""
    if device.platform != "gpu":
        return None
    number = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    capability = None if number is None else (int(number[1]), int(number[2]))
    by_capability = _SHARED_MEMORY.get(capability, _LEAST) if capability else _LEAST
    return GPU(capability, getattr(device, "shared_memory_per_block_optin", by_capability))
