"""The end of a run that hangs: one whose file server does not answer, or whose other processes wait for it."""

import faulthandler
import os
import sys
import threading
from typing import Any

_LOOKS = 60  # at the run, within the minutes that it may be silent


class Watchdog:
    """Ends the process, with status 1, the stacks of its threads and a line of what it was doing, when within the block it
    gives no sign of life for ``minutes``; 0 means never. A scheduler may then start the run again.

    The time is counted from ``start`` to ``rest``, and not while the process itself is stopped, as by a scheduler that
    suspends it.
    """

    def __init__(self, minutes: float):
        self._minutes = minutes
        self._counts = False
        self._doing: list[str] | None = None  # another list with each sign of life; None while nothing is counted
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    def start(self) -> None:
        """From the next sign of life on the time counts."""
        self._counts = True

    def rest(self) -> None:
        """Until ``start``, signs of life are not asked for: a program is compiled, which may take as long as it likes."""
        self._counts, self._doing = False, None

    def at(self, what: str) -> None:
        """A sign of life, and what is begun."""
        if self._counts:
            self._doing = [what]

    def _watch(self) -> None:
        # Looks are counted, and not the time between two of them, which is long where the process was stopped.
        seen, same = self._doing, 0
        while not self._over.wait(60 * self._minutes / _LOOKS):
            doing = self._doing
            seen, same = doing, same + 1 if doing is seen else 0
            if doing is not None and same >= _LOOKS:
                self._end(doing[0])

    def _end(self, what: str) -> None:
        faulthandler.dump_traceback(all_threads=True)
        print(
            f"{os.path.basename(sys.argv[0])}: no sign of life for {self._minutes:g} minutes in {what} "
            "(training.patience_minutes); above are the stacks of this process. The same command goes on from the newest "
            "checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
