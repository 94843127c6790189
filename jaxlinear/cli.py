"""What every program in ``launch/`` shares: parse flags, call one function, turn bad input into one line and status 2."""

import errno
import os
import sys
from collections.abc import Callable

from absl import flags

from jaxlinear.errors import RunError, UserError

# Errors of the machine that the person at the keyboard can mend; everything else keeps its traceback.
_ENVIRONMENT_ERRORS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOTDIR: "a part of the path is not a directory",
}


def run(main: Callable[[], int | None], argv: list[str] | None = None) -> None:
    """Parses absl flags, calls ``main()`` and exits with its status (None means 0).

    ``UserError``, a malformed flag and the errors of a full or read-only disk become one line on stderr and exit
    status 2. Any other exception is a defect and keeps its traceback.
    """
    argv = sys.argv if argv is None else argv
    try:
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: every option is written --name=value")
        status = main()
    except flags.Error as error:
        _refuse(argv, str(error))
    except UserError as error:
        _refuse(argv, str(error))
    except RunError as error:
        _report(argv, str(error))
        sys.exit(1)
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRORS:
            raise
        _refuse(argv, f"{_ENVIRONMENT_ERRORS[error.errno]}: {error.filename or error.strerror}")
    else:
        sys.exit(status or 0)


def _refuse(argv: list[str], message: str) -> None:
    _report(argv, message)
    sys.exit(2)


def _report(argv: list[str], message: str) -> None:
    print(f"{os.path.basename(argv[0])}: {' '.join(message.split())}", file=sys.stderr)
