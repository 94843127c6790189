"""The names of the ways to run an operation, and the refusal of those that an operation lacks."""

from jaxlinear.errors import UserError


def check(operation: str, backend: str, known: tuple[str, ...]) -> None:
    """Raises ``UserError`` unless ``backend`` is ``"auto"`` or one of ``known``."""
    if backend != "auto" and backend not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise UserError(f"{operation} has no backend {backend!r}; it has {names}")
