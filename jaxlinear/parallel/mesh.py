"""The mesh of devices that a config asks for, and the place of each device in it.

On TPUs an axis of the mesh lies along axes of the torus (``jax.experimental.mesh_utils``), whichever hosts the devices
belong to, and slices, which only a data centre network joins, are laid along ``data``. Elsewhere devices keep the order
in which they are listed, process by process: ``tensor`` and ``expert``, the innermost axes, are joined by NVLink.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlinear.errors import UserError
from jaxlinear.parallel import sharding

_LOG = logging.getLogger(__name__)

# JAX lays up to this many devices round one ring, whatever the mesh. That is best for one axis over all of them; with
# several axes, neighbours are nearer host by host: with data 2 x fsdp 4 on v5e:2x4, 2 hops over data instead of 3.
_TRAY = 8

AXES = ("data", "fsdp", "sequence", "tensor", "expert")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with the axes ``AXES``; one size may be -1, and takes what the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: sizes[axis] for axis in AXES}
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) > 1:
        raise UserError(f"only one size of the mesh can be -1, not both mesh.{free[0]} and mesh.{free[1]}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(devices) % fixed:
            asked = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size not in (1, -1))
            raise UserError(f"{asked} does not divide the {len(devices)} available devices")
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    if math.prod(shape) != len(devices):
        raise UserError(f"a mesh of {_named(shape)} does not use each of the {len(devices)} available devices once")
    return Mesh(_over_slices(shape, devices), AXES)


def _over_slices(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the shape of the mesh; each slice of TPUs has a part of ``data``, its first axis."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    count, data = len(slices), shape[0]
    if len({len(part) for part in slices.values()}) > 1:
        each = ", ".join(str(len(slices[index])) for index in sorted(slices))
        raise UserError(f"the {count} slices have {each} devices; a mesh needs the same number from each slice")
    if data % count:
        nearest = min(
            (n for n in range(count, len(devices) + 1, count) if len(devices) % n == 0), key=lambda n: abs(n - data)
        )
        raise UserError(
            f"mesh.data={data} is not a multiple of the {count} slices, and no other axis can cross slices; the "
            f"nearest that works is mesh.data={nearest}, with the other axes over {len(devices) // nearest} devices "
            "in total"
        )
    part = (data // count, *shape[1:])
    return np.concatenate([_over_torus(part, slices[index]) for index in sorted(slices)])


def _over_torus(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice in the shape of the mesh."""
    if len(devices) <= _TRAY and sum(size > 1 for size in shape) > 1:
        return np.asarray(devices).reshape(shape)
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:  # for example, not a whole box of a torus
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        _warn(f"JAX cannot place a mesh of {_named(shape)} on the torus: {reason}")
        return np.asarray(devices).reshape(shape)


@functools.cache
def _warn(problem: str) -> None:
    """Warns once of each problem."""
    _LOG.warning("%s; devices are taken in their given order, and exchanges may take longer routes", problem)


def _named(shape: Sequence[int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True) if size != 1) or "1"


def from_text(parts: Sequence[str]) -> Mesh:
    """A mesh over all devices from ``["sequence=4", "fsdp=2"]``; ``data`` takes what is left unless it is named."""
    sizes = {**dict.fromkeys(AXES, 1), "data": -1}
    named = set()
    for part in parts:
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise UserError(f"{part!r} is not a part of a mesh; write AXIS=SIZE, where the axes are {', '.join(AXES)}")
        if axis in named:
            raise UserError(f"{axis} is given twice in the mesh {','.join(parts)}; leave one out")
        named.add(axis)
        sizes[axis] = int(size)
    return make_mesh(sizes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of ``[B, T]`` arrays of tokens."""
    return NamedSharding(mesh, PartitionSpec(sharding.RULES["batch"], sharding.RULES["time"]))
