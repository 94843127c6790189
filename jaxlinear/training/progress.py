"""How far a run is, on stderr: a bar on a terminal, or lines in a log, where a bar would be one long line."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxlinear.parallel import distributed

_LOG = logging.getLogger(__name__)
_SECONDS_A_LINE = 20  # at least


class Progress:
    """The progress of a run of ``steps`` that resumes at ``step``. Only the first process shows it. The library's messages
    appear above the bar."""

    def __init__(self, *, step: int, steps: int):
        self._steps, self._shown = steps, distributed.is_first()
        self._said: float | None = None
        self._open = contextlib.ExitStack()
        self._bar: tqdm | None = None
        if self._shown and sys.stderr.isatty():
            bar = tqdm(total=steps, initial=step, unit="step", mininterval=0.5, file=sys.stderr, dynamic_ncols=True)
            self._bar = self._open.enter_context(bar)
            self._open.enter_context(logging_redirect_tqdm([logging.getLogger("jaxlinear")]))

    def at(self, step: int, *, loss: float, tokens_per_second: float, step_seconds: float) -> None:
        """``step`` steps are done."""
        if self._bar is not None:
            self._bar.set_postfix({"loss": f"{loss:.3f}", "tok/s": f"{tokens_per_second:,.0f}"}, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        due = self._said is None or now - self._said >= _SECONDS_A_LINE or step == self._steps
        if self._shown and due:
            self._said = now
            left = tqdm.format_interval((self._steps - step) * step_seconds)
            rates = f"{tokens_per_second:,.0f} tokens/s, {left} left"
            _LOG.info("step %d of %d: loss %.3f, %s", step, self._steps, loss, rates)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Shows what ``heldout.Evaluation`` measured."""
        if self._shown:
            _LOG.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def close(self) -> None:
        self._open.close()
