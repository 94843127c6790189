"""The files of a run of a sweep: their paths, the run's lock, its attempts. Imports nothing heavy, since each job of a
sweep begins with it."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxlinear import locks
from jaxlinear.errors import UserError

_PATIENCE = 10.0  # seconds that a job waits for the lock, which is held for a moment by processes that only look
_TAIL = 65_536  # bytes read from the end of a log or of metrics


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The paths of the run ``name`` of the sweep in directory ``sweep``."""

    sweep: Path
    name: str

    @property
    def workdir(self) -> Path:
        """The run's own directory, as ``launch/train.py`` makes it."""
        return self.sweep / "runs" / self.name

    @property
    def job(self) -> Path:
        """What the sweep keeps about the run."""
        return self.sweep / "jobs" / self.name

    @property
    def config(self) -> Path:
        return self.job / "config.json"

    @property
    def log(self) -> Path:
        return self.job / "log.txt"

    @property
    def _attempts(self) -> Path:
        return self.job / "attempts.jsonl"

    def attempts(self) -> list[dict[str, Any]]:
        """Each start of the run: ``host``, ``pid`` and ``begin``; ``end``, ``status`` and ``error`` if its end was seen.
        Truncated lines are left out."""
        found: list[dict[str, Any]] = []
        lines = self._attempts.read_text(encoding="utf-8").split("\n")[:-1] if self._attempts.exists() else []
        for line in lines:
            with contextlib.suppress(
                ValueError
            ):  # a line truncated by a full disk or a kill, with the next one appended to it
                values = json.loads(line)
                if "begin" in values:
                    found.append(values)
                elif found:
                    found[-1] |= values
        return found

    def begin(self, **values: Any) -> None:
        """Records a start of the run, with further values."""
        self._append({"begin": time.time(), **values})

    def end(self, status: int) -> None:
        """Records the end of the newest attempt. A negative status is a signal."""
        failed = status != 0
        self._append({"end": time.time(), "status": status, "error": last_line(self.log) if failed else None})

    def _append(self, values: dict[str, Any]) -> None:
        with self._attempts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[BinaryIO | None]:
        """Holds the run's lock, or gives None if another process does. A child that inherits the file holds it too, so the
        lock lasts as long as any process of the run."""
        with (self.job / "lock").open("ab") as file:
            begin = time.monotonic()
            while not (held := locks.take(file)) and time.monotonic() - begin < _PATIENCE:
                time.sleep(0.05)
            yield file if held else None

    def is_running(self) -> bool:
        """Whether a process on this machine (or on any, if the file system can tell) works on the run."""
        path = self.job / "lock"
        if not path.exists():
            return False
        with path.open("ab") as file:
            try:
                return not locks.take(file, shared=True)
            except OSError as error:
                if error.errno not in locks.NO_LOCKS:
                    raise
                return False  # no sweep runs there (``hold``): the directory was copied


@contextlib.contextmanager
def hold(sweep: Path) -> Iterator[bool]:
    """Holds the lock of a sweep's directory; gives False at once if another process does.

    Raises:
      UserError: the file system has no locks, which a sweep needs to tell which of its runs are in progress.
    """
    with (sweep / "lock").open("ab") as file:
        try:
            held = locks.take(file)
        except OSError as error:
            if error.errno not in locks.NO_LOCKS:
                raise
            raise UserError(
                f"the file system of {sweep} has no locks ({error.strerror}), which a sweep needs so that no run is "
                "started twice; give it a --workdir on another file system"
            ) from None
        yield held


def last_line(path: Path) -> str:
    """The last line of a log that is not empty. Text that a progress bar overwrote is not a line."""
    lines = [line.rsplit("\r", 1)[-1].strip() for line in tail(path).split("\n")]
    return next((line for line in reversed(lines) if line), "")


def tail(path: Path) -> str:
    """The end of a text file; empty if there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        return file.read().decode("utf-8", "replace")
