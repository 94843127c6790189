"""The program that a process runs, described as text: processes that train together have to run the same one."""

import hashlib
import importlib.metadata
import os
import re
from pathlib import Path

import jax

import jaxlinear

# Everything that computes a step or orders the data, and the TPU and GPU plugins that may be installed.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")
_PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
)
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Hosts may differ in these: paths that are written or read, and the number of devices that a CPU counts as.
_OF_A_HOST = re.compile(r"--\w*dump|--xla_force_host_platform_device_count|[^/]*/")


def text() -> str:
    """Versions, a hash of this library's code, the JAX settings that change results, and the compilers' flags."""
    versions = [f"jaxlinear {jaxlinear.__version__} (code {_code(Path(jaxlinear.__file__).parent)})"]
    for package in (*_PACKAGES, *_PLUGINS):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            if package not in _PLUGINS:
                raise
    settings = [f"{name}={getattr(jax.config, name, None)}" for name in _SETTINGS]  # a newer JAX may have dropped one
    flags = [f"{name}={' '.join(_host_flags(os.environ.get(name, '')))!r}" for name in _FLAGS]
    return ", ".join(versions + settings + flags)


def _code(directory: Path) -> str:
    """The first digits of a hash of a package's Python files and their paths."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory).as_posix()}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def _host_flags(flags: str) -> list[str]:
    return sorted(flag for flag in flags.split() if not _OF_A_HOST.match(flag))
