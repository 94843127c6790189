"""Ends a run that hangs: one whose file server does not answer, or whose other processes wait for it."""

import faulthandler
import os
import sys
import threading
from typing import Any

_LOOKS = 60  # how often the run is looked at within the minutes that it may be silent


class Watchdog:
    """Ends the process if, in this context, it gives no sign of life for ``minutes``; 0 means never. It ends with status 1,
    the stacks of its threads and a line about what it was doing. A scheduler may then start the run again.

    Time counts from ``start`` to ``rest``, but not while the process itself is stopped, as by a scheduler that
    suspends it.
    """

    def __init__(self, minutes: float):
        self._minutes = minutes
        self._counts = False
        self._doing: list[str] | None = None  # a new list with each sign of life; None while time does not count
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    def start(self) -> None:
        """Time counts from the next sign of life on."""
        self._counts = True

    def rest(self) -> None:
        """No signs of life are expected until ``start``: a program is being compiled, which may take any time."""
        self._counts, self._doing = False, None

    def at(self, what: str) -> None:
        """A sign of life, with the name of what begins now."""
        if self._counts:
            self._doing = [what]

    def _watch(self) -> None:
        # Looks are counted rather than the time between them, which is long if the process was stopped.
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
            "(training.patience_minutes); above are the stacks of this process. The same command resumes from the "
            "newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
