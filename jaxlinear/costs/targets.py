"""Targets without hardware: devices of TPU slices or GPU hosts that this machine can compile for without having them.

The compilers are the real ones, those of the packages libtpu and jax-cuda13-plugin (``pip install 'jaxlinear[aot]'``).
They tell how a program is lowered, how much memory it takes, and what it exchanges in which order; not how fast it
runs.
"""

import dataclasses
import importlib.util
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlinear.errors import UserError

if TYPE_CHECKING:
    import jax

# The memory that a program may use on a device, in GiB: libtpu's own "available HBM" (of 0.0.42; for TPU7x, of 0.0.48),
# above which it refuses programs.
_TPUS = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # of a slice's shape
DEVICES_A_CHIP = {"tpu7x": 2}  # one on the others
GPU_MEMORY_FRACTION = 0.9  # that a run takes unless the user has set another. The rest is for CUDA and NCCL
MEMORY_FRACTION, OLD_MEMORY_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # JAX's variables
_GPUS_A_HOST = 8

# What the CUDA plugin would read from the device: a description in the text form of XLA's GpuTargetConfigProto.
_H100_BYTES = 84_929_347_584
_H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {_H100_BYTES} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # libtpu would ask the metadata server of a TPU VM for these, and complain that there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Otherwise only one process at a time can hold libtpu, as if it were a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """``devices`` are for meshes and programs compiled ahead of time; nothing runs on them."""

    name: str
    devices: Sequence["jax.Device"]
    memory_bytes: int  # what a program may use of one device

    @property
    def slices(self) -> int:
        """The number of slices, for TPUs; one for GPUs."""
        return len({getattr(device, "slice_index", 0) for device in self.devices})


def set_environment() -> None:
    """Makes this a process that compiles for targets and computes on the CPU. A program calls it first, since JAX reads
    some of the variables when it is imported. What the user has set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def gpu_memory_fraction() -> float:
    """The fraction of a GPU's memory that a run takes: what the user has set for JAX, under the old name of the variable
    too, or else ours."""
    found = {name: text for name in (MEMORY_FRACTION, OLD_MEMORY_FRACTION) if (text := os.environ.get(name))}
    if len(found) == 2:
        raise UserError(f"{MEMORY_FRACTION} and {OLD_MEMORY_FRACTION}, its old name, are both set; JAX takes only one")
    for name, text in found.items():
        try:
            fraction = float(text)
        except ValueError:
            fraction = math.nan
        if not 0 < fraction < math.inf:
            raise UserError(f"{name}={text!r} must be a fraction of a GPU's memory, such as {GPU_MEMORY_FRACTION}")
        return fraction
    return GPU_MEMORY_FRACTION


# The slices of v5e and v6e (cloud.google.com/tpu/docs/v5e and v6e). v5p and TPU7x have many, which libtpu knows.
SLICES = {kind: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16") for kind in ("v5e", "v6e")}


def is_size(kind: str, size: str) -> bool:
    """Whether ``size`` is a possible size for this kind: a TPU slice by its shape in chips, ``2x4``, others by their
    number."""
    return re.fullmatch("x".join(["[1-9][0-9]*"] * DIMENSIONS.get(kind, 1)), size) is not None


def parts(name: str) -> tuple[int, str, str]:
    """The number of slices in the name of a target, the kind of its devices and their size: ``2xv5e:16x16`` -> 2, v5e,
    16x16."""
    several, one = re.fullmatch(r"(?:([1-9][0-9]*)x)?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
    kind, _, size = one.partition(":")
    if several and kind not in DIMENSIONS:
        raise UserError(
            f"{name}: only TPU slices can be multiplied, as in 2xv5e:16x16; for GPUs give the total number, as in "
            "h100:16"
        )
    return int(several or 1), kind, size


def find(name: str) -> Target:
    """The target of that name: ``v5e:2x4`` (also ``v5p``, ``v6e`` and ``tpu7x``; a slice by its shape in chips),
    ``2xv5e:16x16`` (two such slices) or ``h100:16`` (a number of GPUs, eight a host)."""
    slices, kind, size = parts(name)
    if kind in _TPUS and is_size(kind, size):
        return Target(name, _tpus(f"{kind}:{size}", size, slices), int(_TPUS[kind] * 2**30))
    if name == "h100:0":
        raise UserError("h100:0 asks for no GPUs; the smallest target is h100:1")
    if kind == "h100" and is_size(kind, size):
        return Target(name, _gpus(name, int(size)), int(gpu_memory_fraction() * _H100_BYTES))
    raise UserError(
        f"there is no target {name!r}; a target is a TPU slice by its shape (v5e:2x4, v5p:4x4x4, v6e:16x16, "
        "tpu7x:4x4x4; several as 2xv6e:16x16) or a number of GPUs (h100:16)"
    )


def _tpus(name: str, shape: str, slices: int) -> Sequence["jax.Device"]:
    if not _has("libtpu"):
        raise _missing(name, "libtpu")
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    # A host has 2 x 2 chips, unless there is only one chip.
    options: dict[str, Any] = {} if set(shape.split("x")) != {"1"} else {"chips_per_host_bounds": (1, 1, 1)}
    if slices > 1:
        options["num_slices"] = slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except JaxRuntimeError as error:
        raise UserError(f"libtpu does not know the slice {name}: {error}") from error


def _gpus(name: str, count: int) -> Sequence["jax.Device"]:
    for module, package in (
        ("jax_plugins.xla_cuda13", "jax-cuda13-plugin"),
        ("jax_cuda13_plugin", "jax-cuda13-plugin"),
    ):
        if not _has(module):
            raise _missing(name, package)
    if not _has_ptxas():
        raise _missing(name, "ptxas (of nvidia-cuda-nvcc, or of a CUDA toolkit)")
    hosts, rest = divmod(count, _GPUS_A_HOST)
    if rest and hosts:
        raise UserError(
            f"{name}: more than {_GPUS_A_HOST} GPUs must fill whole hosts; the next that works is "
            f"h100:{(hosts + 1) * 8}"
        )
    from jax.experimental import topologies

    layout = f"1x{hosts}x{_GPUS_A_HOST}" if hosts else f"1x1x{count}"
    return topologies.get_topology_desc(name, "cuda", topology=layout, target_config=_H100).devices


def _missing(name: str, package: str) -> UserError:
    return UserError(f"compiling for {name} needs {package}, which is not installed: pip install 'jaxlinear[aot]'")


def _has(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return (not parent or _has(parent)) and importlib.util.find_spec(module) is not None


def _has_ptxas() -> bool:
    """Whether it is where XLA looks: in the wheel, whose place JAX tells it, on the path, or in the toolkit's usual
    place."""
    wheel = importlib.util.find_spec("nvidia")
    places = [] if wheel is None else [Path(place) / "cu13" / "bin" for place in wheel.submodule_search_locations or ()]
    search = os.pathsep.join([*map(str, places), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("ptxas", path=search) is not None
