"""The ways to run an operation: the refusal of those that it lacks, and the platform that a choice is made for."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jaxlinear.errors import UserError
from jaxlinear.pallas.target import GPU, Target, gpu_of

COMPILED = ("tpu", "gpu")  # where kernels are compiled; elsewhere they are interpreted
_OLDEST = 8, 0  # compute capability that Triton compiles for

_LOG = logging.getLogger(__name__)
# Of JAX's own, so that nothing is taken for one platform that was traced for another.
_platform = jax.make_user_context(default_value=None)
_kernels = jax.make_user_context(default_value=True)


@contextlib.contextmanager
def use_platform(name: str, device_kind: str = "", gpu: GPU | None = None) -> Iterator[None]:
    """Within it, operations are traced for this platform, which need not be one of this machine's, and for this kind of
    device, as JAX names it."""
    with _platform((name, device_kind, gpu)), _as_jax_asks(name, device_kind):
        yield


def use_device(device: Any) -> contextlib.AbstractContextManager:
    """Within it, operations are traced for such a device, which need not be one of this machine's."""
    return use_platform(device.platform, device.device_kind, gpu_of(device))


def _as_jax_asks(name: str, device_kind: str) -> contextlib.AbstractContextManager:
    """The lowering of kernels for GPU asks the mesh in use for the kind of device, since JAX 0.11, and where there is none
    the machine."""
    if name != "gpu" or not device_kind or jax.default_backend() == "gpu" or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform=name)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def platform() -> str:
    """What the program that is being traced is for: ``"cpu"``, ``"gpu"`` or ``"tpu"``."""
    return jax.default_backend() if _platform.value is None else _platform.value[0]


def use_kernels(allowed: bool) -> contextlib.AbstractContextManager:
    """Within it ``"auto"`` takes no kernels unless they are ``allowed``, here and around it."""
    return _kernels(allowed and _kernels.value)


def takes_kernels() -> bool:
    """Whether ``"auto"`` looks for a kernel: on TPU and GPU, where ``use_kernels`` allows it."""
    return platform() in COMPILED and _kernels.value


def target() -> Target:
    """What kernels are built for."""
    name, kind, gpu = _platform.value or _of_this_machine()
    return Target(name, kind, name not in COMPILED, gpu)


def _of_this_machine() -> tuple[str, str, GPU | None]:
    device = jax.devices()[0]
    return jax.default_backend(), device.device_kind, gpu_of(device)


def no_kernels(*shapes: tuple[int, ...]) -> str | None:
    """Why no kernel at all is built for the device, or of arrays of such shapes; or None."""
    for shape in shapes:
        if 0 in shape:
            return f"the kernel takes no empty arrays, not one of {list(shape)}"
    _, kind, _, gpu = target()
    if gpu is None:
        return None
    if gpu.capability is None:
        return f"the kernels for GPU are for NVIDIA's, not for {kind}"
    if gpu.capability < _OLDEST:
        least, has = (".".join(map(str, number)) for number in (_OLDEST, gpu.capability))
        return f"the kernels for GPU take compute capability {least} (A100) or more, not {has} ({kind})"
    return None


def indices_are_wide() -> bool:
    """Whether jax_enable_x64 makes them 64 bits."""
    return jax.dtypes.canonicalize_dtype("int64").itemsize == 8


def no_compiler() -> str | None:
    """Why none is compiled of arrays that a kernel takes; or None."""
    if platform() in COMPILED and indices_are_wide():
        return "the kernel is compiled for indices of 32 bits, and jax_enable_x64 makes them 64"
    return None


@functools.cache
def say_once(message: str) -> None:
    """Logs a line the first time that it is given; later ones of the same text are left out."""
    _LOG.info(message)


def check(operation: str, backend: str, known: tuple[str, ...]) -> None:
    """Raises ``UserError`` unless ``backend`` is ``"auto"`` or one of ``known``."""
    if backend != "auto" and backend not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise UserError(f"{operation} has no backend {backend!r}; it has {names}")


def kernel_or_chunks(
    operation: str, backend: str, few: bool, shapes: Iterable[tuple[int, ...]], refusal: Callable[[str], str | None]
) -> str:
    """``"pallas"`` where an operation that has chunks takes its kernel, else ``backend`` as it is given.

    ``few``: so few tokens that ``"auto"`` takes no chunks. ``shapes``: of its arrays. ``refusal``: why the kernel does not
    run on a platform, or None. Where it does not, or none does (``no_kernels``, ``no_compiler``), ``"auto"`` says so once,
    and ``"pallas"`` raises ``UserError``.
    """
    if backend not in ("auto", "pallas") or (backend == "auto" and (not takes_kernels() or few)):
        return backend
    reason = no_kernels(*shapes) or refusal(platform()) or no_compiler()
    if reason is None:
        return "pallas"
    if backend == "pallas":
        raise UserError(f"{operation}: {reason}; backend='chunked' runs it")
    say_once(f"{operation} runs in chunks, not as a kernel: {reason}")
    return backend
