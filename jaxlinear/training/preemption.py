"""SIGTERM, with which schedulers announce that a run will soon be killed."""

import itertools
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

_POINTS = itertools.count(1)  # JAX counts them as long as the process lives


class Preempted(Exception):
    """SIGTERM came, and the work in progress is abandoned."""


class Stop:
    """Whether SIGTERM came while in this context. Processes that train together learn of it at the same point, whichever of
    them received it: JAX then handles the signal and agrees on the point. Only the main thread receives signals; a run in
    another thread does not notice them.

    SIGHUP is treated as SIGTERM unless it is ignored: a machine that shuts down sends both at once to what ssh started. So
    is the first SIGINT, which Python would otherwise raise wherever the run is, and drop where that is a callback. The
    second SIGINT acts as it did before.
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
        # Bypasses sys.stderr, which the frame below may be writing to.
        os.write(2, b"\nCtrl-C: the run saves itself and ends after this step; once more ends it at once\n")
        signal.raise_signal(signal.SIGTERM)

    def came(self) -> bool:
        """Call this after each step and each batch of an evaluation, equally often on every process."""
        if jax.process_count() > 1 and not self._came:
            self._came = multihost_utils.reached_preemption_sync_point(next(_POINTS))
        return self._came

    def check(self) -> None:
        """Raises ``Preempted`` if SIGTERM came."""
        if self.came():
            raise Preempted
