"""One run of a sweep as a job of submitit: ``launch/train.py`` in a process of its own."""

import dataclasses
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from jaxlinear.exit_status import PREEMPTED
from jaxlinear.sweeps.files import RunFiles

BUSY = 73  # another job has the run


@dataclasses.dataclass
class TrainingJob:
    """Called where the job runs. ``environment`` sets variables there; None removes one."""

    sweep: str
    name: str
    command: list[str]
    environment: dict[str, str | None]
    # Set here, not where the call begins: a job may be preempted before that.
    _stopped: bool = dataclasses.field(default=False, init=False, repr=False)
    _child: "subprocess.Popen[bytes] | None" = dataclasses.field(default=None, init=False, repr=False)

    def __call__(self) -> int:
        """Returns the status of the training process. If a job has several tasks, the first one keeps the records."""
        signal.signal(signal.SIGTERM, self._stop)
        self._files = RunFiles(Path(self.sweep), self.name)
        task = os.environ.get("SLURM_PROCID", "0")
        if task != "0":
            return self._train(self._files.log.with_name(f"log.{task}.txt"))
        with self._files.locked() as lock:
            if lock is None:
                return BUSY
            self._files.begin(host=socket.gethostname(), pid=os.getpid(), job=os.environ.get("SLURM_JOB_ID"))
            status = self._train(self._files.log, lock.fileno())
            self._files.end(status)
            return status

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit when the job is about to be preempted or its time is nearly up: the run saves itself, and the
        same job continues when it is started again."""
        self._stop()
        if self._child is not None:
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)  # the interrupted call holds its lock
            self._files.end(PREEMPTED)
        return DelayedSubmission(dataclasses.replace(self))

    def _train(self, log: Path, lock: int | None = None) -> int:
        environment = {**os.environ, **{key: value for key, value in self.environment.items() if value is not None}}
        for key, value in self.environment.items():
            if value is None:
                environment.pop(key, None)
        with log.open("ab") as file:
            child = self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[] if lock is None else [lock],
            )
            if self._stopped:  # before there was a child to signal
                self._stop()
            while child.poll() is None:
                time.sleep(0.1)
        return child.returncode

    def _stop(self, *_: object) -> None:
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
