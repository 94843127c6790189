"""The staging directory, in which a dataset or a converted model is written, and the cleanup after killed programs."""

import contextlib
import logging
import os
import pathlib
import re
import secrets
import shutil
import socket
from collections.abc import Iterator

from jaxlinear import atomic, locks

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def directory(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory beside ``output``, removed at the end if it is still there. A lock in it shows that its writer is
    alive, until ``unlock``."""
    partial = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
    atomic.make_directory(partial)
    try:
        with (partial / (locks.FILE + ".tmp")).open("wb", buffering=0) as file:
            file.write(socket.gethostname().encode())
            try:
                locked = locks.take(file)
            except OSError as error:
                if error.errno not in locks.NO_LOCKS:
                    raise
                locked = False
            # It gets its name only once it is locked: ``clear`` may remove a directory whose lock nobody holds.
            if locked:
                os.rename(file.name, partial / locks.FILE)
            else:
                os.unlink(file.name)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unlock(partial: pathlib.Path) -> None:
    """To be called when everything is written and the directory is about to be renamed."""
    (partial / locks.FILE).unlink(missing_ok=True)


def clear(output: pathlib.Path) -> None:
    """Removes what killed writers of ``output`` left behind on this host. Only logs what may belong to another writer, and
    a dataset that was moved aside to be replaced."""
    if not output.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{output.name}.") + "(partial|old)-[0-9a-f]{8}")
    for left in sorted(output.parent.iterdir()):
        found = pattern.fullmatch(left.name)
        if found and found[1] == "old":
            _LOG.warning("%s was moved aside by an --overwrite that was killed; remove it, or move it back", left)
        elif found and not _cleared(left) and left.exists():
            _LOG.warning(
                "%s belongs to a run that was killed or is still writing; remove it if no run is writing", left
            )


def _cleared(partial: pathlib.Path) -> bool:
    """Whether there is nothing left to report."""
    try:
        with (partial / locks.FILE).open("r+b") as file:
            if not locks.take(file):
                return True  # its writer is alive
            # Another host's lock may be invisible here, on a file system that keeps each host's locks separate.
            if file.read() != socket.gethostname().encode():
                return False
            shutil.rmtree(partial, ignore_errors=True)
    except OSError:  # no lock file, or no support for locks
        return False
    _LOG.warning("removed %s, left by a run that was killed", partial)
    return True
