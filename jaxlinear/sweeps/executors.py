"""Starts the runs of a sweep, on this machine or with SLURM, both through submitit."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit

from jaxlinear.errors import UserError
from jaxlinear.sweeps.runner import TrainingJob

_TEN_YEARS = 60 * 24 * 3650  # minutes; submitit's local jobs end after two unless told otherwise
_REQUEUES = 1000
# Options of sbatch that submitit must know, since it counts tasks and time; others are passed on unchanged.
_KNOWN = {"time": "time", "nodes": "nodes", "ntasks-per-node": "ntasks_per_node"}


class Local:
    """Processes on this machine. With ``gpus_per_run``, each run sees GPUs of its own."""

    name = "local"

    def __init__(self, folder: Path, *, parallel: int, gpus_per_run: int = 0):
        if parallel < 1:
            raise UserError(f"--parallel={parallel} must be at least 1")
        self.parallel = parallel
        self._executor = submitit.LocalExecutor(folder)
        self._executor.update_parameters(timeout_min=_TEN_YEARS)
        self._slots: dict[int, submitit.Job | None] = dict.fromkeys(range(parallel))
        self._gpus = gpus_per_run

    @property
    def gives_gpus(self) -> bool:
        """Whether each run gets GPUs of its own."""
        return self._gpus > 0

    def submit(self, job: TrainingJob) -> submitit.Job:
        slot = next(slot for slot, holder in self._slots.items() if holder is None or holder.done())
        job.environment["CUDA_VISIBLE_DEVICES"] = self._devices(slot)
        with _blocked(signal.SIGINT):  # Ctrl-C is for the sweep, which makes its runs save themselves
            submitted = self._slots[slot] = self._executor.submit(job)
        return submitted

    def find(self, identifier: str) -> "_Orphan":
        """The job that an earlier sweep started."""
        return _Orphan(int(identifier), str(self._executor.folder))

    def _devices(self, slot: int) -> str | None:
        """The GPUs that the runs of a slot see: those that this program sees, or a share of them."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not self._gpus:
            return visible
        names = visible.split(",") if visible is not None else [str(i) for i in range(self._gpus * self.parallel)]
        if len(names) < self._gpus * self.parallel:
            raise UserError(
                f"--parallel={self.parallel} runs of --gpus_per_run={self._gpus} need {self._gpus * self.parallel} GPUs; "
                f"CUDA_VISIBLE_DEVICES names {len(names)}"
            )
        return ",".join(names[slot * self._gpus : (slot + 1) * self._gpus])


@dataclasses.dataclass(frozen=True)
class _Orphan:
    """A local job whose parent has gone: the process ``pid``, if it is still one of submitit's for this folder."""

    pid: int
    folder: str

    def done(self, force_check: bool = False) -> bool:
        try:
            os.kill(self.pid, 0)
            return self.folder not in Path(f"/proc/{self.pid}/cmdline").read_text(encoding="utf-8", errors="replace")
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            return True


class Slurm:
    """SLURM jobs with options of ``sbatch``, such as ``partition=gpu``."""

    name = "slurm"
    gives_gpus = False  # SLURM does that

    def __init__(self, folder: Path, *, parallel: int | None, options: Sequence[str]):
        self.parallel = parallel or 1_000_000
        try:
            self._executor = submitit.SlurmExecutor(folder, max_num_timeout=_REQUEUES)
        except RuntimeError as error:
            raise UserError(f"--executor=slurm: {error}; --executor=local runs on this machine") from error
        self._folder = folder
        self._executor.update_parameters(**_parameters(options))

    def submit(self, job: TrainingJob) -> submitit.Job:
        self._executor.update_parameters(job_name=job.name[:100])
        try:
            return self._executor.submit(job)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise UserError(f"sbatch refused the run {job.name}: {error}") from error

    def find(self, identifier: str) -> submitit.Job:
        """The job that an earlier sweep submitted."""
        return submitit.SlurmJob(self._folder, identifier)


def _parameters(options: Sequence[str]) -> dict[str, Any]:
    given: dict[str, str] = {}
    for option in options:
        name, separator, value = option.lstrip("-").partition("=")
        if not separator or not name:
            raise UserError(
                f"--sbatch={option}: write an option of sbatch and its value, such as --sbatch=partition=gpu"
            )
        if name in given:
            raise UserError(f"--sbatch={option}: {name} is given twice; leave one out")
        given[name] = value
    if "time" not in given:
        raise UserError("--executor=slurm needs the time limit of a job in minutes: --sbatch=time=MINUTES")
    parameters: dict[str, Any] = {"additional_parameters": {}}
    for name, value in given.items():
        if name not in _KNOWN:
            parameters["additional_parameters"][name] = value
        elif value.isdecimal() and int(value) > 0:
            parameters[_KNOWN[name]] = int(value)
        else:
            raise UserError(f"--sbatch={name}={value}: it must be a whole number" + " of minutes" * (name == "time"))
    return parameters


@contextlib.contextmanager
def _blocked(number: int) -> Iterator[None]:
    """Processes started inside never get the signal. This process gets signals that arrived meanwhile at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
