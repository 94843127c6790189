"""Errors that end a run with one line: the input is wrong (``UserError``), or the work cannot go on now (``RunError``).

Any other exception is a defect in the program and keeps its traceback (``jaxlinear.cli``).
"""

import errno

# Errors of the machine that the user can fix; all other errors keep their traceback.
_ENVIRONMENT_ERRORS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the file system or the limit of this process (ulimit -f) permits",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOTDIR: "a part of the path is not a directory",
    errno.ENAMETOOLONG: "a name in the path is too long",
}
# Failures of a machine: the same command may well succeed on another machine, or later.
_FAILURES_OF_A_DISK = {
    errno.EIO: "a disk or a file server failed (input/output error)",
    errno.ESTALE: "a file server no longer knows a file that was open (stale file handle)",
    errno.ENOTCONN: "a file system is no longer mounted (not connected)",
}


class UserError(Exception):
    """Bad input or an impossible request. Its message is one line: what is wrong, why, and the nearest thing that works.

    Programs in ``launch/`` print the message on stderr and exit with status ``BAD_INPUT``, without a traceback.
    """


class EveryProcessError(UserError):
    """Bad input that every process of a run has detected, so that all of them end."""


class RunError(Exception):
    """The work cannot go on now, but another start may succeed. Programs print the message as one line on stderr and exit
    with status ``FAILED``, the status of a traceback too; schedulers restart a run that ends so.
    """


class Diverged(RunError):
    """The work cannot go on, and the same command would fail in the same way: status ``BAD_INPUT``."""


def machine_error(error: OSError) -> UserError | RunError | None:
    """The error of one line for a failure of the machine; None for what may be a defect, such as a missing file."""
    if error.errno in _ENVIRONMENT_ERRORS:
        return UserError(f"{_ENVIRONMENT_ERRORS[error.errno]}: {error.filename or error.strerror}")
    if error.errno in _FAILURES_OF_A_DISK:
        return RunError(_FAILURES_OF_A_DISK[error.errno] + (f": {error.filename}" if error.filename else ""))
    return None
