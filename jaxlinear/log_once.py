"""Log lines that are worth reading once."""

import contextlib
import logging
from collections.abc import Iterator

_LOG = logging.getLogger("jaxlinear")
_logged: set[str] = set()
_muted: list[None] = []  # the contexts ``muted`` that are open


def info_once(message: str) -> None:
    """Logs a message the first time it is given."""
    if message not in _logged and not _muted:
        _logged.add(message)
        _LOG.info(message)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """In this context nothing is logged: it traces programs that are not run."""
    _muted.append(None)
    try:
        yield
    finally:
        _muted.pop()
