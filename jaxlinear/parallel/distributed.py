"""Joining the processes of one run, and what they must agree on."""

import contextlib
import glob
import importlib.util
import itertools
import logging
import math
import os
import re
import secrets
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from jaxlinear.costs import targets
from jaxlinear.errors import EveryProcessError, RunError, UserError, machine_error
from jaxlinear.parallel import program

_GOOGLE = "0x1ae0"  # vendor of PCI devices
_LOG = logging.getLogger(__name__)

JOIN_PATIENCE = 30 * 60.0  # seconds: hosts of one slice or job come up minutes apart, pulling images and installing
_SLURM_PATIENCE = 10 * 60.0
_SAYS_SO_EVERY = 60.0  # seconds
_ABORT_LATER = 60  # seconds by which JAX's own timeout comes after ours
# A second apart: a network file system may show another host's file late, and NFS a directory's content 60 s late.
_LOOKS_AT_A_FILE = 10
_LOOKS_AT_A_LISTING = 90


def use_gpu_memory() -> None:
    """Called before any device is touched: lets a run take as much of a GPU's memory as ``targets`` assumes, where JAX
    by itself takes three quarters. What the user has set stays, under the old name of the variable too."""
    fraction = targets.gpu_memory_fraction()
    if not os.environ.get(targets.OLD_MEMORY_FRACTION):
        os.environ[targets.MEMORY_FRACTION] = str(fraction)


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    patience: float = JOIN_PATIENCE,
) -> None:
    """Joins this process to the others of its run, before any device is touched; alone, it does nothing.

    If ``coordinator`` (HOST:PORT of process 0), the number of ``processes`` and the number of this one are given, they
    are used. Otherwise SLURM (more than one task in the step) and TPU pods, including those of GKE, are recognised by
    their environment, and JAX finds the rest by itself. If the others do not come within ``patience`` seconds, the
    process prints one line and ends with status 1, after which a scheduler may try again.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if not missing:
        assert processes is not None and process is not None
        if not 0 <= process < processes:
            raise UserError(f"--process={process} is not one of the --processes={processes}, which are numbered from 0")
        with _waiting(f"the other processes (of {processes}) at {coordinator}", patience):
            jax.distributed.initialize(
                coordinator, processes, process, initialization_timeout=math.ceil(patience) + _ABORT_LATER
            )
    elif len(missing) < len(given):
        raise UserError(f"--coordinator, --processes and --process must be given together; --{missing[0]} is missing")
    elif _under_a_scheduler():
        if "SLURM_PROCID" in os.environ:  # SLURM starts all at once, and its nodes idle meanwhile
            patience = min(patience, _SLURM_PATIENCE)
        with _waiting("the other processes of this run", patience):
            jax.distributed.initialize(
                local_device_ids=_gpus_of_a_node(), initialization_timeout=math.ceil(patience) + _ABORT_LATER
            )


@contextlib.contextmanager
def _waiting(whom: str, patience: float) -> Iterator[None]:
    """Logs now and then whom the context waits for, and ends the process after ``patience`` seconds. JAX's own timeout is
    an abort in C++, which cannot be caught and gives a stack instead of a reason."""
    over = threading.Event()

    def watch() -> None:
        begin = time.monotonic()
        while not over.wait(min(_SAYS_SO_EVERY, patience)):
            seconds = time.monotonic() - begin
            if seconds >= patience:
                print(
                    f"{os.path.basename(sys.argv[0])}: {whom} did not connect within {patience / 60:.3g} minutes: "
                    "were they started, and can process 0 be reached from all hosts?",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            _LOG.info("waiting for %s, %d of %d minutes", whom, seconds // 60, patience // 60)

    threading.Thread(target=watch, name="joining", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def expect(what: str) -> None:
    """Raises ``RunError`` on every process unless together they see these devices: ``gpu:16``, ``tpu:64``, ``cpu:2``."""
    platform, _, count = what.partition(":")
    if not re.fullmatch(r"[1-9]\d*", count) or platform not in _PLATFORMS:
        raise UserError(
            f"--expect={what!r} must be PLATFORM:DEVICES, such as gpu:16; the platforms are {', '.join(_PLATFORMS)}"
        )
    found = jax.default_backend()
    seen = _gathered(_PLATFORMS.index(found) if found in _PLATFORMS else -1, jax.local_device_count())
    if np.all(seen[:, 0] == _PLATFORMS.index(platform)) and seen[:, 1].sum() == int(count):
        return
    by_what: dict[str, list[int]] = {}
    for process, (index, devices) in enumerate(seen.tolist()):
        by_what.setdefault(f"{devices} {_PLATFORMS[index] if index >= 0 else 'unknown'}", []).append(process)
    each = "; ".join(f"process {_named(np.array(processes))} sees {words}" for words, processes in by_what.items())
    advice = (
        "" if jax.process_count() > 1 or int(count) == 1 else "; it runs alone: were the other processes not found?"
    )
    # For example, a GPU has fallen off: the next start may be given other devices.
    raise RunError(f"{count} {platform} devices are expected in total, but {each}{advice}")


_PLATFORMS = ("cpu", "gpu", "tpu")


def _gpus_of_a_node() -> list[int] | None:
    """Under SLURM, JAX takes one GPU per process. A node's only process takes all that are visible."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    visible = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    if "SLURM_PROCID" not in os.environ or not re.fullmatch(r"1(\(x\d+\))?", tasks) or len(visible) < 2:
        return None
    return list(range(len(visible)))


def _under_a_scheduler() -> bool:
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))) > 1
    slurm = slurm and "SLURM_PROCID" in os.environ
    # Every pod of a JobSet has the first two. JAX finds the other pods only on TPUs, by the third.
    gke = {"JOBSET_NAME", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"} <= set(os.environ)
    return slurm or gke or (_has("libtpu") and _has_tpus())


def _has_tpus() -> bool:
    """Whether there are device files like those of TPUs, and a PCI device of Google's, by which JAX finds TPUs. Neither is
    enough: VFIO gives programs other devices too, on machines that have libtpu to compile for TPUs, and a network card may
    be Google's."""
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return False
    return any(Path(path).read_text().strip() == _GOOGLE for path in glob.glob("/sys/bus/pci/devices/*/vendor"))


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_first() -> bool:
    """Whether this process writes what only one may write: configs, metrics, the progress bar."""
    return jax.process_index() == 0


def check_same_program() -> None:
    """Raises ``UserError`` on every process unless all run the same code, versions and compiler flags. Otherwise they
    might train together something that none of them was meant to train, or wait for each other."""
    if jax.process_count() > 1:
        own = program.text()
        check_agreement("the program", own, f", with the same versions on every host; here it is {own}")


def check_agreement(what: str, text: str, advice: str = "") -> None:
    """Raises ``UserError`` on every process unless all were given the same text."""
    if jax.process_count() == 1:
        return
    of_all = _gathered(zlib.crc32(text.encode()), len(text))
    others = np.flatnonzero((of_all != of_all[0]).any(axis=1))
    if len(others):
        raise EveryProcessError(
            f"{what} of process {_named(others)} differs from that of process 0; all must be given the same{advice}"
        )


_EXCHANGES = itertools.count()  # of ``_gathered``, equally many on every process
_FOR_EVER = 7 * 24 * 3600 * 1000  # ms. JAX ends the others if a process is gone
_KINDS = (None, EveryProcessError, RunError)


def _kind(error: UserError | RunError) -> type[EveryProcessError] | type[RunError]:
    return EveryProcessError if isinstance(error, UserError) else RunError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If a ``UserError``, a ``RunError`` or a failure of the machine is raised within the context on some processes, every
    process raises one of the first two: otherwise the others would wait."""
    error: UserError | RunError | None = None
    try:
        yield
    except (UserError, RunError) as raised:
        error = raised
    except OSError as raised:
        error = machine_error(raised)
        if error is None or jax.process_count() == 1:
            raise
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    kinds = _gathered(_KINDS.index(None if error is None else _kind(error)))[:, 0]
    failed = np.flatnonzero(kinds)
    if error is not None:
        raise _kind(error)(str(error)) from error
    if len(failed):
        kind = _KINDS[kinds[failed].min()]
        assert kind is not None
        raise kind(f"process {_named(failed)} failed; its own message says why")


def check_shared(what: str, directory: Path) -> None:
    """Raises ``UserError`` on every process unless all of them see what the first one writes in ``directory``."""
    if jax.process_count() == 1:
        return
    written = directory / f".written_by_process_0_{_gathered(secrets.randbelow(2**31))[0, 0]}"
    if is_first():
        written.touch()
    _gathered(0)  # it exists by now: a host that looked before that may remember that it did not
    unseen = np.flatnonzero(np.array(seen_by_each(lambda: int(written.exists()), _LOOKS_AT_A_FILE)) == 0)
    if is_first():
        written.unlink()
    if len(unseen):
        raise EveryProcessError(
            f"{what} {directory} of process {_named(unseen)} is not that of process 0, which wrote a file there; all "
            "processes of a run must share one directory, on a network file system or in a bucket that all hosts mount"
        )


def seen_by_each(look: Callable[[], int], looks: int = _LOOKS_AT_A_LISTING) -> list[int]:
    """The result of ``look()`` on each process, in order: as soon as all agree, or else after ``looks`` attempts, a
    second apart. ``look`` reads a disk, of which a host may know an older state; its result is below 2**31."""
    for _ in range(looks - 1):
        seen = _gathered(look())[:, 0]
        if (seen == seen[0]).all():
            return seen.tolist()
        time.sleep(1)
    return _gathered(look())[:, 0].tolist()


def as_the_first(value: bool) -> bool:
    """The value of the first process, on all of them."""
    return bool(_gathered(int(value))[0, 0])


def _gathered(*numbers: int) -> np.ndarray:
    """``[processes, numbers]``. The processes' coordinator has them: an exchange between devices would need equally many
    on each process, which is one of the things that are checked."""
    processes, own = jax.process_count(), ",".join(map(str, numbers))
    texts = own
    if processes > 1:
        from jax._src import distributed  # JAX has no public way to its coordinator

        client, key = distributed.global_state.client, f"jaxlinear/{next(_EXCHANGES)}"
        if client is None:
            raise RunError("the processes of a run must call jax.distributed.initialize() first")
        if is_first():
            others = [client.blocking_key_value_get(f"{key}/{i}", _FOR_EVER) for i in range(1, processes)]
            texts = ";".join([own, *others])
            client.key_value_set(f"{key}/all", texts)
        else:
            client.key_value_set(f"{key}/{jax.process_index()}", own)
            texts = client.blocking_key_value_get(f"{key}/all", _FOR_EVER)
    return np.array([text.split(",") for text in texts.split(";")], np.int64)


def _named(processes: np.ndarray) -> str:
    return ", ".join(map(str, processes))
