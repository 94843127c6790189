"""The ways to run an operation: the refusal of those that it lacks, and the platform that a choice is made for."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import jax

from jaxlinear.errors import UserError
from jaxlinear.pallas.target import Target

COMPILED = ("tpu", "gpu")  # where kernels are compiled; elsewhere they are interpreted

_LOG = logging.getLogger(__name__)
# Of JAX's own, so that nothing is taken for one platform that was traced for another.
_platform = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use_platform(name: str, device_kind: str = "") -> Iterator[None]:
    """Within it, operations are traced for this platform, which need not be one of this machine's, and for this kind of
    device, as JAX names it."""
    with _platform((name, device_kind)), _as_jax_asks(name, device_kind):
        yield


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


def target() -> Target:
    """What kernels are built for."""
    name, kind = _platform.value or (jax.default_backend(), jax.devices()[0].device_kind)
    return Target(name, kind, interpret=name not in COMPILED)


@functools.cache
def say_once(message: str) -> None:
    _LOG.info(message)


def check(operation: str, backend: str, known: tuple[str, ...]) -> None:
    """Raises ``UserError`` unless ``backend`` is ``"auto"`` or one of ``known``."""
    if backend != "auto" and backend not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise UserError(f"{operation} has no backend {backend!r}; it has {names}")


def kernel_or_chunks(operation: str, backend: str, few: bool, refusal: Callable[[str], str | None]) -> str:
    """``"pallas"`` where an operation that has chunks takes its kernel, else ``backend`` as it is given.

    ``few``: so few tokens that ``"auto"`` takes no chunks. ``refusal``: why the kernel does not run on a platform, or None;
    then ``"auto"`` says so once, and ``"pallas"`` raises ``UserError``.
    """
    if backend not in ("auto", "pallas") or (backend == "auto" and (platform() not in COMPILED or few)):
        return backend
    reason = refusal(platform())
    if reason is None:
        return "pallas"
    if backend == "pallas":
        raise UserError(f"{operation}: {reason}; backend='chunked' runs it")
    say_once(f"{operation} runs in chunks, not as a kernel: {reason}")
    return backend
