"""Locks that keep programs out of each other's directories. A lock ends with the process that holds it, however that
ends."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxlinear.errors import RunError

_LOG = logging.getLogger(__name__)

FILE = "lock"
# Seconds: a scheduler may restart a run while the killed one is still ending, and an NFS server keeps the lock of a host
# that has gone for 90 s.
_PATIENCE = 120.0
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # the file system does not support locks


def take(file: BinaryIO, *, shared: bool = False) -> bool:
    """Locks an open file; returns False at once if another program holds it. ``shared`` locks exclude exclusive ones."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def of_run(directory: Path) -> Iterator[None]:
    """Holds a run's directory exclusively, after waiting a while for another program that holds it. If the file system has
    no locks, the log says so.

    Raises:
      RunError: another program still holds it.
    """
    path = directory / FILE
    with path.open("ab", buffering=0) as file:
        try:
            _wait(file, path)
            locked = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locked = False
            _LOG.warning(
                "the file system of %s has no locks (%s): a second run started there would not be refused",
                directory,
                error.strerror,
            )
        if locked:
            holder = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            file.truncate(0)
            file.write(json.dumps(holder).encode() + b"\n")
        try:
            yield
        finally:
            if locked:
                # A disk error here would hide the one that came before.
                with contextlib.suppress(OSError):
                    file.truncate(0)


def _wait(file: BinaryIO, path: Path) -> None:
    begin = time.monotonic()
    said = False
    while not take(file):
        if time.monotonic() - begin >= _PATIENCE:
            raise RunError(
                f"{_holder(path)} is using {path.parent}; end it first, or give the new run a --workdir of its own "
                f"(if no such process exists, its host has died: remove {path})"
            )
        if not said:
            _LOG.info("%s is using %s: waiting for it, %.0f seconds at most", _holder(path), path.parent, _PATIENCE)
            said = True
        time.sleep(min(1.0, _PATIENCE))


def _holder(path: Path) -> str:
    """Describes the process that wrote the file when it took the lock."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return f"the run of process {values['pid']} on {values['host']}, started {values['time']},"
    except (OSError, ValueError, KeyError, TypeError):  # it is written after the lock is taken and emptied at the end
        return "another run"
