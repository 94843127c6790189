"""The backends of operations: the check that one exists, the choice of kernels, and the platform that is traced for."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear import log_once
from jaxlinear.errors import UserError
from jaxlinear.pallas.parts.target import GPU, Target, gpu_of

_TAKEN = (np.dtype(np.float32), np.dtype(jnp.bfloat16))  # dtypes of ``refused_dtype``
COMPILED = ("tpu", "gpu")  # where kernels are compiled; elsewhere they are interpreted
_OLDEST = 8, 0  # the oldest compute capability that Triton compiles for

# JAX's own contexts, so that nothing traced for one platform is reused for another.
_platform = jax.make_user_context(default_value=None)
_kernels = jax.make_user_context(default_value=True)


class Form(NamedTuple):
    """The form in which an operation runs, chosen once from the device, the dtypes and the shapes (``choose``)."""

    name: str  # a backend of the operation other than "auto"
    chunk: int | None = None  # tokens per chunk, where it has chunks; None for a kernel's own
    refused: str | None = None  # why it is not the kernel, where "auto" would have taken that

    @property
    def is_kernel(self) -> bool:
        return self.name == "pallas"


@contextlib.contextmanager
def use_platform(name: str, device_kind: str = "", gpu: GPU | None = None) -> Iterator[None]:
    """In this context, operations are traced for this platform and for this kind of device, by JAX's name for it.
    Neither need be this machine's."""
    with _platform((name, device_kind, gpu)), _as_jax_asks(name, device_kind):
        yield


def use_device(device: Any) -> contextlib.AbstractContextManager:
    """In this context, operations are traced for such a device, which need not be one of this machine's."""
    return use_platform(device.platform, device.device_kind, gpu_of(device))


def _as_jax_asks(name: str, device_kind: str) -> contextlib.AbstractContextManager:
    """Since JAX 0.11, the lowering of GPU kernels takes the kind of device from the mesh in use or, if there is none,
    from the machine."""
    if name != "gpu" or not device_kind or jax.default_backend() == "gpu" or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform=name)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def platform() -> str:
    """The platform that the program being traced is for: ``"cpu"``, ``"gpu"`` or ``"tpu"``."""
    return jax.default_backend() if _platform.value is None else _platform.value[0]


def use_kernels(allowed: bool) -> contextlib.AbstractContextManager:
    """In this context ``"auto"`` uses kernels only if they are ``allowed`` both here and in the contexts around it."""
    return _kernels(allowed and _kernels.value)


def takes_kernels() -> bool:
    """Whether ``"auto"`` looks for a kernel: on TPU and GPU, where ``use_kernels`` allows it."""
    return platform() in COMPILED and _kernels.value


def target() -> Target:
    """What kernels are built for."""
    name, kind, gpu = _platform.value or _this_machine()
    return Target(name, kind, name not in COMPILED, gpu)


def _this_machine() -> tuple[str, str, GPU | None]:
    device = jax.devices()[0]
    return jax.default_backend(), device.device_kind, gpu_of(device)


def no_kernels(*shapes: tuple[int, ...]) -> str | None:
    """Why no kernel can be built for this device or for arrays of such shapes, or None."""
    for shape in shapes:
        if 0 in shape:
            return f"the kernel takes no empty arrays, such as this one of shape {list(shape)}"
    _, kind, _, gpu = target()
    if gpu is None:
        return None
    if gpu.capability is None:
        return f"the kernels for GPU run on NVIDIA GPUs only, not on {kind}"
    if gpu.capability < _OLDEST:
        least, has = (".".join(map(str, number)) for number in (_OLDEST, gpu.capability))
        return f"the kernels for GPU need compute capability {least} (A100) or higher, not {has} ({kind})"
    return None


def indices_are_wide() -> bool:
    """Whether indices are 64 bits wide, as under jax_enable_x64."""
    return jax.dtypes.canonicalize_dtype("int64").itemsize == 8


def no_compiler() -> str | None:
    """Why no kernel can be compiled even for arrays that it takes, or None."""
    if platform() in COMPILED and indices_are_wide():
        return "the kernel is compiled for 32-bit indices, and jax_enable_x64 makes them 64-bit"
    return None


def check(operation: str, backend: str, known: tuple[str, ...]) -> None:
    """Raises ``UserError`` unless ``backend`` is ``"auto"`` or one of ``known``."""
    if backend != "auto" and backend not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise UserError(f"{operation} has no backend {backend!r}; it has {names}")


def choose(
    operation: str,
    backend: "str | Form",
    forms: tuple[str, ...],
    *,
    plain: str,
    few: str | None = None,
    shapes: Iterable[tuple[int, ...]] = (),
    refusal: Callable[[str], str | None],
    on: tuple[str, ...] = COMPILED,
) -> "Form":
    """The form in which an operation runs, for the arrays of one device.

    Args:
      operation: its name.
      backend: what the caller asked for, or a form that is chosen already.
      forms: those that the operation has.
      plain: the form that takes the kernel's place.
      few: the form of ``"auto"`` if there are too few tokens for the kernel and for ``plain``; None if there are not.
      shapes: those of the arrays.
      refusal: why the kernel does not run on a given platform, or None.
      on: the platforms where there is a kernel and ``"auto"`` takes it. Where it does not run there (``no_kernels``,
        ``no_compiler``, ``refusal``), ``"auto"`` says so once, and ``"pallas"`` raises ``UserError``.
    """
    if isinstance(backend, Form):
        return backend
    check(operation, backend, forms)
    here = platform()
    if backend == "auto" and few is not None:
        return Form(few)
    if backend == "auto" and not (here in on and takes_kernels()):
        return Form(plain)
    if backend not in ("auto", "pallas"):
        return Form(backend)
    elsewhere = "the kernel is for TPUs" if here in COMPILED and here not in on else None
    reason = no_kernels(*shapes) or elsewhere or refusal(here) or no_compiler()
    if reason is None:
        return Form("pallas")
    if backend == "pallas":
        raise UserError(f"{operation}: {reason}; use backend={plain!r}")
    log_once.info_once(f"{operation} runs as {plain!r}, not as a kernel: {reason}")
    return Form(plain, refused=reason)


def refused_dtype(platform: str, *dtypes: Any) -> str | None:
    """Why a kernel for float32 and bfloat16 does not run with numbers of these dtypes where it is compiled; or None."""
    for dtype in dtypes:
        if platform in COMPILED and dtype not in _TAKEN:
            return f"the kernel takes {' and '.join(map(str, _TAKEN))}, not {dtype}"
    return None
