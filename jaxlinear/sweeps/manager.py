"""Starts the runs of a sweep, as many at a time as allowed, until all are finished or have failed."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlinear import atomic
from jaxlinear.exit_status import FAILED, FINISHED, PREEMPTED
from jaxlinear.sweeps import executors, planned_config, states
from jaxlinear.sweeps.files import last_line
from jaxlinear.sweeps.runner import TrainingJob
from jaxlinear.sweeps.sweep import PlannedRun, Sweep

_SUBMITTED = "submitted.json"  # in jobs/NAME: the run's latest job and its scheduler

Table = list[tuple[str, states.Progress]]


@dataclasses.dataclass(frozen=True)
class _Job:
    """A job of a run: submitit's, or None if only the run's lock shows that it is running; ``attempts`` and ``step`` are
    the run's before the job, -1 if an earlier manager submitted it."""

    job: Any
    attempts: int
    step: int


class Manager:
    """Works on a sweep that ``sweep.prepare`` holds. Runs that an earlier manager left running or queued are waited for,
    not started again; unfinished ones continue from their checkpoints."""

    def __init__(self, sweep: Sweep, executor: executors.Local | executors.Slurm, train: Sequence[str]):
        """``train`` is the command that runs ``launch/train.py``, without its flags."""
        self._sweep, self._executor, self._train = sweep, executor, list(train)
        self._runs = {run.name: run for run in sweep.runs}
        self._waiting: list[str] = []
        self._jobs: dict[str, _Job] = {}
        self._errors: dict[str, str] = {}  # of the runs that failed under this manager
        self._finished: dict[str, states.Progress] = {}
        self._stop = False

    def run(self, show: Callable[[Table], None], *, poll: float = 2.0) -> int:
        """Works until nothing more can be done. ``show`` gets the state of every run each time the manager has looked.

        Returns 0 if all runs are finished, 1 if some failed, and 75 after SIGINT or SIGTERM: local runs have then saved
        themselves, SLURM jobs stay, and the same command continues.
        """
        with self._signals():
            self._look()
            while (self._jobs or self._waiting) and not self._stop:
                self._settle()
                while self._waiting and not self._stop and self._has_room():
                    self._submit(self._waiting.pop(0))
                show(self.progress())
                time.sleep(poll if self._jobs else 0)
            if self._stop and self._executor.name == executors.Local.name:
                self._stop_runs(show, poll)
            table = self.progress()
            show(table)
        if all(progress.state == states.FINISHED for _, progress in table):
            return FINISHED
        return PREEMPTED if self._stop else FAILED

    def progress(self) -> Table:
        """The state of every run, in the order of the plan."""
        table = []
        for name, run in self._runs.items():
            progress = self._finished.get(name) or run.progress(queued=name in self._jobs)
            if progress.state == states.FINISHED:
                self._finished[name] = progress
            elif name in self._errors:
                progress = dataclasses.replace(progress, state=states.FAILED, error=self._errors[name])
            table.append((name, progress))
        return table

    def _look(self) -> None:
        """Determines what there is to do, whatever happened before."""
        for name, run in self._runs.items():
            job = self._submitted(run)
            if run.files.is_running() or job is not None:
                self._jobs[name] = _Job(job, -1, -1)
            elif not states.is_finished(run.files, run.steps):
                self._waiting.append(name)

    def _submitted(self, run: PlannedRun) -> Any:
        """The job that an earlier manager submitted, if its scheduler still has it. A file truncated by a full disk counts
        as none: the run's lock then shows whether the run is in progress."""
        try:
            last = json.loads((run.files.job / _SUBMITTED).read_text(encoding="utf-8"))
            executor, number = last["executor"], last["job"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if executor != self._executor.name:
            return None
        job = self._executor.find(number)
        return None if job is None or job.done(force_check=True) else job

    def _has_room(self) -> bool:
        inherited = any(job.attempts < 0 for job in self._jobs.values())
        # Which GPUs an inherited run holds is unknown, so runs that get GPUs of their own wait until it ends.
        return len(self._jobs) < self._executor.parallel and not (inherited and self._executor.gives_gpus)

    def _submit(self, name: str) -> None:
        run = self._runs[name]
        command = [
            *self._train,
            f"--config={planned_config.__file__}:{run.files.config}",
            f"--workdir={run.files.workdir}",
        ]
        before = run.progress()
        job = self._executor.submit(TrainingJob(str(self._sweep.directory), name, command, {}))
        submitted = {"executor": self._executor.name, "job": job.job_id}
        atomic.write_text(run.files.job / _SUBMITTED, json.dumps(submitted) + "\n")
        self._jobs[name] = _Job(job, before.attempts, before.step)

    def _settle(self) -> None:
        """Records the jobs that have ended."""
        for name, job in list(self._jobs.items()):
            run = self._runs[name]
            if (job.job is not None and not job.job.done()) or run.files.is_running():
                continue
            del self._jobs[name]
            progress = run.progress()
            if progress.state == states.FINISHED:
                continue
            if progress.attempts == job.attempts:
                reason = last_line(Path(job.job.paths.stderr))
                self._errors[name] = f"its job ended before it began: {reason or 'without a word'}"
            elif progress.state == states.FAILED:
                self._errors[name] = progress.error or ""
            elif progress.step > job.step or self._stop:  # it was told to stop, perhaps before its first step
                self._waiting.append(name)
            else:
                self._errors[name] = f"interrupted before it got beyond step {progress.step}"

    def _stop_runs(self, show: Callable[[Table], None], poll: float) -> None:
        """Sends SIGTERM to each run as soon as it has begun; the runs save themselves."""
        told = set()
        while self._jobs:
            for name, job in self._jobs.items():
                files = self._runs[name].files
                if name in told or not files.is_running():
                    continue
                # Between taking its lock and writing its line, a job has only the lines of earlier jobs.
                attempts = files.attempts()
                if len(attempts) <= max(job.attempts, 0) or "end" in attempts[-1]:
                    continue
                if attempts[-1]["host"] == socket.gethostname():
                    try:
                        os.kill(attempts[-1]["pid"], signal.SIGTERM)
                    except ProcessLookupError:
                        continue
                told.add(name)
            show(self.progress())
            time.sleep(poll)
            self._settle()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks to stop; a second one ends the program while runs continue."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, _: Any) -> None:
            self._stop = True
            signal.signal(number, signal.SIG_DFL)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
