"""Where the numbers of a run go: ``metrics.jsonl`` and TensorBoard events."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlinear import atomic
from jaxlinear.errors import UserError
from jaxlinear.parallel import distributed

if TYPE_CHECKING:
    from jaxlinear.training.tensorboard import TensorBoard

FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes numbers by step. It is opened at the step from which a run resumes: what was logged after that step is
    dropped, since those steps will be taken again."""

    def __init__(self, workdir: Path, *, step: int, tensorboard: bool):
        # The first process of a run writes; the lines of the others are discarded.
        first = distributed.is_first()
        self._file = _open_at(workdir / FILE, step) if first else open(os.devnull, "a")
        self._board = _board(workdir, step + 1) if tensorboard and first else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl`` and one point of each TensorBoard curve."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.write(step, values)

    def sync(self) -> None:
        """Returns once all that was written so far is on disk: needed before a checkpoint that covers these steps."""
        self._file.flush()
        if distributed.is_first():
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.sync()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            if self._board is not None:
                self._board.close()


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, oldest first. A truncated last line is left out."""
    return json_lines(Path(workdir) / FILE)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that is written line by line; none if there is no file. A last line that was truncated, as when
    a program is killed, is left out; any other invalid line, as a disk may leave it, raises ``UserError``."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is damaged ({error}); remove that line") from error
    return found


def _board(workdir: Path, purge_step: int) -> "TensorBoard":
    # Not for those who only read, or want no curves: tensorboardX imports torch if it is installed, which takes seconds.
    from jaxlinear.training.tensorboard import TensorBoard

    return TensorBoard(workdir, purge_step=purge_step)


def _open_at(path: Path, step: int):
    kept = [json.dumps(line) + "\n" for line in read(path.parent) if line["step"] <= step]
    atomic.write_text(path, "".join(kept))
    return path.open("a", encoding="utf-8")
