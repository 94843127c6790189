"""What all programs in ``launch/`` share: parse flags, call one function, turn bad input into one line and status 2."""

import importlib.util
import logging
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import ModuleType

from absl import flags
from absl import logging as absl_logging

from jaxlinear import cli_flags
from jaxlinear.errors import Diverged, EveryProcessError, RunError, UserError, machine_error
from jaxlinear.exit_status import BAD_INPUT, FAILED

# Flags that name a file or directory, in any program that has them.
_PATHS = {"workdir", "output", "json", "data", "source"}


def run(
    main: Callable[..., int | None],
    argv: list[str] | None = None,
    *,
    takes_arguments: bool = False,
    waits_for_threads: bool = True,
) -> None:
    """Parses absl flags, calls ``main()`` and exits with its status (None means 0). Positional arguments are refused or,
    with ``takes_arguments``, passed to ``main``. ``--help`` prints the help and calls nothing.

    ``UserError``, a malformed flag, a full or read-only disk and a device with too little memory become one line on stderr
    and exit status 2: the same command would fail again in the same way. ``RunError`` and a failing disk become one line
    and status 1. Any other exception is a defect and keeps its traceback. If a process fails alone while others run beside
    it, it ends at once; without ``waits_for_threads``, so does a process that runs alone, whatever threads it has.
    """
    argv = sys.argv if argv is None else argv
    message, status, alone, failed = None, 0, False, True
    try:
        if cli_flags.help_wanted(argv):
            cli_flags.print_help(argv)
            sys.exit(0)
        rest = cli_flags.parse(argv)
        if rest and not takes_arguments:
            raise UserError(f"unexpected argument {rest[0]!r}: every option is written --name=value")
        _check_paths()
        _show_messages()
        status = (main(rest) if takes_arguments else main()) or 0
        failed = False
    except (flags.Error, UserError) as error:
        message, status = str(error), BAD_INPUT
        alone = not isinstance(error, EveryProcessError)
    except RunError as error:  # raised by every process
        message, status = str(error), BAD_INPUT if isinstance(error, Diverged) else FAILED
    except Exception as error:
        message, status = _machine_error(error)
        if message is None:
            if not _has_others() and waits_for_threads:
                raise
            traceback.print_exc()
        alone = True
    if message is not None:
        print(f"{os.path.basename(argv[0])}: {' '.join(message.split())}", file=sys.stderr)
    if (alone and _has_others()) or (failed and not waits_for_threads and not _has_others()):
        # At exit JAX waits for the other processes, and they for data from this one; they notice its end. Python waits for
        # threads: those of a checkpoint that could not be written wait five minutes for each other.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def end_by_sigterm(status: int) -> None:
    """Makes SIGTERM, while it has no other handler, end the program at once with ``status``: for when there is nothing to
    save. It works inside C++ too, e.g. while a process waits for the others, where Python's own handlers have to wait.
    Ctrl-C ends the program at once, too, by the signal's default action."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ends = threading.Lock()

    def end(number: int, frame: object) -> None:
        if not ends.acquire(blocking=False):
            return  # the other thread, or this one in a frame below, is already ending the program
        try:  # not through sys.stderr, which the frame below may be writing to
            os.write(2, f"{os.path.basename(sys.argv[0])}: SIGTERM, with nothing to save\n".encode())
        finally:
            os._exit(status)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is end:
                end(number[0], None)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="sigterm", daemon=True).start()


def stop_by_sigterm() -> None:
    """Makes SIGTERM end the program as Ctrl-C does, by an exception, so that half-made files are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def leave_out_warnings_of_orbax() -> None:
    """For programs that read or convert runs: silences Orbax's warnings in absl's log about checkpoints written by others,
    arrays that are not JAX's, and the options it is called with."""
    absl_logging.set_verbosity(absl_logging.ERROR)


def load_module(path: str | os.PathLike) -> ModuleType:
    """Loads a Python file that belongs to no package, such as those in ``configs/``."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_output(flag: str, path: str | None) -> None:
    """Raises ``UserError`` unless ``path`` can be written as a file. Call it before the work, which would be wasted."""
    if not path:
        return
    if pathlib.Path(path).is_dir():
        raise UserError(f"--{flag}={path} is a directory; name a file in it")
    directory = pathlib.Path(os.path.realpath(path)).parent  # of the target, if the path is a link
    if not directory.is_dir():
        raise UserError(f"--{flag}={path}: its directory does not exist")
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):  # false on a read-only disk, too
        raise UserError(
            f"--{flag}={path} cannot be written: the disk is read-only, or the path belongs to another user"
        )


def check_path(flag: str, path: str) -> None:
    """Raises ``UserError`` for a URL, or for a ~ that no shell has expanded: they would become directories with such names
    on the local disk."""
    if (home := os.path.expanduser(path)) != path:
        raise UserError(f"--{flag}={path}: a shell does not expand {path.split('/')[0]} after =; write --{flag}={home}")
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/+", path):
        raise UserError(
            f"--{flag}={path}: a path must be in a file system, not {scheme[0]}; mount the bucket on every host (for "
            "Google Cloud Storage: gcsfuse) and give the path below the mount"
        )


def _check_paths() -> None:
    for flag in sorted(_PATHS & set(flags.FLAGS)):
        values = flags.FLAGS[flag].value
        for path in [values] if isinstance(values, str) else values or ():
            if not path:  # it would mean the current directory
                raise UserError(f"--{flag} is empty; give it a path, or leave it out if it has a default")
            check_path(flag, path)


def _machine_error(error: Exception) -> tuple[str | None, int]:
    """The message and exit status for an error caused by the machine; None and ``FAILED`` for a defect."""
    if isinstance(error, OSError) and (found := machine_error(error)):
        return str(found), BAD_INPUT if isinstance(found, UserError) else FAILED
    message = _out_of_memory(error)
    return message, FAILED if message is None else BAD_INPUT


def _out_of_memory(error: Exception) -> str | None:
    """The message for a device that is out of memory; None for any other error."""
    found = re.search(r"RESOURCE_EXHAUSTED: [^\n]*memory[^\n]*", str(error))
    if found is None or type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return None
    advice = (
        "more training.microbatches, model.remat or mesh.fsdp need less, and launch/compile.py says what fits"
        if "config" in flags.FLAGS
        else "smaller batches or shorter texts need less, and more devices have more"
    )
    return f"a device does not have enough memory: {found[0]}; {advice}"


def _has_others() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _show_messages() -> None:
    """Sends the library's log messages to stderr unchanged. Other libraries' loggers are left alone."""
    logger = logging.getLogger("jaxlinear")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
