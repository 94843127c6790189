"""The mesh of devices that a config asks for."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlinear.errors import UserError
from jaxlinear.parallel import sharding

AXES = ("data", "fsdp", "sequence", "tensor", "expert")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with the axes ``AXES``; one size may be -1, which takes what the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: sizes[axis] for axis in AXES}
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) > 1:
        raise UserError(f"only one size of the mesh can be -1, not both mesh.{free[0]} and mesh.{free[1]}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(devices) % fixed:
            asked = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
            raise UserError(f"{asked} does not divide the {len(devices)} devices that there are")
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        named = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "1"
        raise UserError(f"a mesh of {named} does not use the {len(devices)} devices that there are, each once")
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def from_text(parts: Sequence[str]) -> Mesh:
    """A mesh over all devices from ``["sequence=4", "fsdp=2"]``; ``data`` takes what is left unless it is named."""
    sizes = {**dict.fromkeys(AXES, 1), "data": -1}
    for part in parts:
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdigit() or int(size) < 1:
            raise UserError(f"{part!r} is not a part of a mesh; write AXIS=SIZE, the axes being {', '.join(AXES)}")
        sizes[axis] = int(size)
    return make_mesh(sizes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where ``[B, T]`` arrays of tokens lie."""
    return NamedSharding(mesh, PartitionSpec(sharding.RULES["batch"], sharding.RULES["time"]))
