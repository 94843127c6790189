"""The ways to run an operation: the refusal of those that it lacks, and the platform that a choice is made for."""

import contextlib
from collections.abc import Iterator

import jax

from jaxlinear.errors import UserError

_platforms: list[str] = []


@contextlib.contextmanager
def use_platform(name: str) -> Iterator[None]:
    """Within it, operations are traced for this platform, which need not be one of this machine's."""
    _platforms.append(name)
    try:
        yield
    finally:
        _platforms.pop()


def platform() -> str:
    """What the program that is being traced is for: ``"cpu"``, ``"gpu"`` or ``"tpu"``."""
    return _platforms[-1] if _platforms else jax.default_backend()


def check(operation: str, backend: str, known: tuple[str, ...]) -> None:
    """Raises ``UserError`` unless ``backend`` is ``"auto"`` or one of ``known``."""
    if backend != "auto" and backend not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise UserError(f"{operation} has no backend {backend!r}; it has {names}")
