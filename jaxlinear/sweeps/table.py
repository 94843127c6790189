"""The states of a sweep's runs as text: a table that is redrawn on a terminal, or a line per change elsewhere."""

import collections
import shutil
from collections.abc import Sequence
from typing import TextIO

from jaxlinear.sweeps import states
from jaxlinear.sweeps.states import Progress

_HEAD = f"{'state':<12}{'step':>14}{'loss':>9}{'held out':>10}{'tokens/s':>10}  run"


def text(table: Sequence[tuple[str, Progress]], height: int | None = None) -> str:
    """The table. If it is higher than ``height``, first the finished and then the waiting runs are only counted."""
    shown = list(table)
    for state in (states.FINISHED, states.WAITING):
        if height is not None and len(shown) + 3 > height:
            shown = [(name, progress) for name, progress in shown if progress.state != state]
    if height is not None:
        shown = shown[: max(height - 3, 1)]
    return "\n".join([summary(table), _HEAD, *(_row(name, progress) for name, progress in shown)])


def summary(table: Sequence[tuple[str, Progress]]) -> str:
    """How many runs are in each state."""
    counts = collections.Counter(progress.state for _, progress in table)
    order = (states.FINISHED, states.RUNNING, states.QUEUED, states.INTERRUPTED, states.FAILED, states.WAITING)
    return f"{len(table)} runs: " + ", ".join(f"{counts[state]} {state}" for state in order if counts[state])


def _row(name: str, progress: Progress) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    step = f"{progress.step}/{progress.steps}"
    return (
        f"{progress.state:<12}{step:>14}{number(progress.loss, '.3f'):>9}{number(progress.heldout_loss, '.3f'):>10}"
        f"{number(progress.tokens_per_second, ',.0f'):>10}  {name}" + (f": {progress.error}" if progress.error else "")
    )


class Live:
    """Shows tables as they change; on a terminal, each replaces the last one."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._terminal = stream.isatty()
        self._lines = 0
        self._states: dict[str, str] = {}

    def show(self, table: Sequence[tuple[str, Progress]]) -> None:
        """Redraws the table on a terminal; elsewhere writes a line for each run whose state has changed."""
        if self._terminal:
            size = shutil.get_terminal_size()
            lines = [line[: size.columns - 1] for line in text(table, size.lines - 1).split("\n")]
            up = f"\x1b[{self._lines}A" if self._lines else ""
            self._stream.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
            self._lines = len(lines)
        else:
            for name, progress in table:
                if self._states.get(name, states.WAITING) != progress.state:
                    self._stream.write(_row(name, progress) + "\n")
                self._states[name] = progress.state
        self._stream.flush()
