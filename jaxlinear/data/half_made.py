"""The hidden directory that a dataset or a converted model is written to, and what programs that were killed left of it."""

import contextlib
import logging
import os
import pathlib
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from typing import BinaryIO

from jaxlinear import locks

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def directory(output: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory beside ``output``; whatever is still there at the end is removed. A lock in it says that its writer
    lives, until ``unlock``."""
    partial = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        with (partial / (locks.FILE + ".tmp")).open("wb", buffering=0) as file:
            file.write(socket.gethostname().encode())
            # It is named when it is locked: ``clear`` may remove the directory of a lock that nobody has.
            if _take(file):
                os.rename(file.name, partial / locks.FILE)
            else:
                os.unlink(file.name)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unlock(partial: pathlib.Path) -> None:
    """For when all is written, and the directory is to be renamed."""
    (partial / locks.FILE).unlink(missing_ok=True)


def clear(output: pathlib.Path) -> None:
    """Removes what writers of ``output`` left that were killed on this host. Of what may be another's, and of a dataset
    that was moved aside to be replaced, it says in the log that it is there."""
    if not output.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{output.name}.") + "(partial|old)-[0-9a-f]{8}")
    for left in sorted(output.parent.iterdir()):
        found = pattern.fullmatch(left.name)
        if found and found[1] == "old":
            _LOG.warning("%s was moved aside by an --overwrite that was killed; remove it, or move it back", left)
        elif found and not _cleared(left) and left.exists():
            _LOG.warning("%s was left by a run that was killed, or is at work; remove it if none is", left)


def _cleared(partial: pathlib.Path) -> bool:
    """Whether nothing need be said of it."""
    try:
        with (partial / locks.FILE).open("r+b") as file:
            if not locks.take(file):
                return True  # its writer lives
            # The lock of another host may not be seen here, as where a file system keeps locks of each host alone.
            if file.read() != socket.gethostname().encode():
                return False
            shutil.rmtree(partial, ignore_errors=True)
    except OSError:  # no lock there, or no locks at all
        return False
    _LOG.warning("removed %s, which a run that was killed had left", partial)
    return True


def _take(file: BinaryIO) -> bool:
    try:
        return locks.take(file)
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        return False
