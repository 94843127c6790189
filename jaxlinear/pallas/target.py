"""What a kernel is built for."""

from typing import Any, NamedTuple


class Target(NamedTuple):
    """``platform``: "tpu", "gpu" or another, where kernels are interpreted. ``kind``: JAX's name of the device.
    ``interpret``: as ``pallas_call`` takes it."""

    platform: str
    kind: str
    interpret: Any = False
