"""SIGTERM, by which schedulers say that a run will be killed soon."""

import itertools
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

_POINTS = itertools.count(1)  # JAX counts them as long as the process lives


class Preempted(Exception):
    """SIGTERM came, and what is under way is left as it is."""


class Stop:
    """Whether SIGTERM came, within the block. Processes that train together hear of it at the same point, whichever of them
    it came to: JAX then handles the signal and agrees on the point. Signals come to the main thread alone; a run in another
    does not hear of them.

    SIGHUP is taken for SIGTERM, unless it is ignored: a machine that shuts down sends both at once to what ssh began. So is
    the first SIGINT, as Python would raise it wherever the run is, and where that is a callback drop it; the second is what
    it was before.
    """

    def __init__(self) -> None:
        self._came = False
        in_main = threading.current_thread() is threading.main_thread()
        self._listens = in_main and jax.process_count() == 1
        self._hears_hang_up = in_main and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        self._interrupt = signal.getsignal(signal.SIGINT)
        self._hears_interrupt = in_main and self._interrupt in (signal.SIG_DFL, signal.default_int_handler)

    def __enter__(self) -> "Stop":
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        if self._hears_hang_up:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
        if self._hears_interrupt:
            signal.signal(signal.SIGINT, self._handle_interrupt)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._hears_interrupt:
            signal.signal(signal.SIGINT, self._interrupt)
        if self._hears_hang_up:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, *_: Any) -> None:
        self._came = True

    def _handle_interrupt(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._interrupt)
        # Past sys.stderr, which the frame below may be writing to.
        os.write(2, b"\nCtrl-C: the run saves itself and ends after this step; once more ends it at once\n")
        signal.raise_signal(signal.SIGTERM)

    def came(self) -> bool:
        """To be asked after each step and each batch of an evaluation, by every process as often as by the others."""
        if jax.process_count() > 1 and not self._came:
            self._came = multihost_utils.reached_preemption_sync_point(next(_POINTS))
        return self._came

    def check(self) -> None:
        """Raises ``Preempted`` if it came."""
        if self.came():
            raise Preempted
