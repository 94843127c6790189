"""How far a run of a sweep is. Its own directory says whether it is finished; its attempts say what else became of it."""

import contextlib
import dataclasses
import json
import logging
import os
import signal
from typing import Any

from jaxlinear import config as configs
from jaxlinear.checkpoint import DIRECTORY, Checkpoints
from jaxlinear.errors import UserError
from jaxlinear.exit_status import PREEMPTED
from jaxlinear.sweeps.files import RunFiles, tail
from jaxlinear.training import heldout, metrics
from jaxlinear.training.workdir import CONFIG, check_same_run, read_config, saved_steps

FINISHED, RUNNING, QUEUED, INTERRUPTED, FAILED, WAITING = (
    "finished",
    "running",
    "queued",
    "interrupted",
    "failed",
    "waiting",
)

_INTERRUPTED = (None, PREEMPTED, -signal.SIGTERM, -signal.SIGINT)  # a signal that came before the run could save itself

_LOG = logging.getLogger(__name__)
_ASKED = ("tasks", "examples")  # what evaluations measure besides the loss
_MEASURED = ("evaluation.batches",)  # how much text the losses of a sweep cover: the same for all runs


@dataclasses.dataclass(frozen=True)
class Progress:
    """``error`` is that of the last failed attempt. Losses and rates are None until there are some."""

    state: str
    step: int
    steps: int
    loss: float | None = None
    heldout_loss: float | None = None
    tokens_per_second: float | None = None
    attempts: int = 0
    error: str | None = None


def read(files: RunFiles, steps: int, *, queued: bool = False) -> Progress:
    """The run's progress towards ``steps``. ``queued`` means that a scheduler has a job for it."""
    values = _newest_metrics(files)
    attempts = files.attempts()
    state, error = WAITING, None
    if is_finished(files, steps):
        state = FINISHED
    elif files.is_running():
        state = RUNNING
    elif queued:
        state = QUEUED
    elif attempts:
        status = attempts[-1].get("status")
        if status in _INTERRUPTED:
            state = INTERRUPTED
        elif status != 0:  # after 0, more steps are planned than when it ended
            state, error = FAILED, _reason(attempts[-1])
    return Progress(state=state, steps=steps, attempts=len(attempts), error=error, **values)


def is_finished(files: RunFiles, steps: int) -> bool:
    """Whether the run's newest complete checkpoint is of its last step, and evaluated if the plan asks for it (which may
    have been added after the run began)."""
    if not (files.workdir / DIRECTORY).is_dir():
        return False
    # A run saves at its end; if there is no such directory, Orbax need not be asked.
    names = [name for name in os.listdir(files.workdir / DIRECTORY) if name.isdigit() and int(name) >= steps]
    if not names:
        return False
    checkpoints = Checkpoints(files.workdir)
    found = checkpoints.steps()
    checkpoints.close()
    if not found or found[-1] < steps:
        return False
    config = configs.from_json(files.config.read_text(encoding="utf-8")) if files.config.exists() else None
    return not heldout.is_owed(config or read_config(files.workdir), files.workdir, steps)


def check_unchanged(files: RunFiles, planned: str) -> None:
    """Raises ``UserError`` if the run in the directory is not the planned one (the text of ``config.json``), or is already
    beyond its last step, on a learning-rate schedule that was to end later."""
    if not (files.workdir / CONFIG).exists():
        return
    begun = read_config(files.workdir)
    config = configs.from_json(planned)
    if config.model.vocab_size is None:
        config.model.vocab_size = begun.model.vocab_size  # determined by the data
    check_same_run(files.workdir, begun, config, goes_on=False, compared=_MEASURED)
    come_to = max(saved_steps(files.workdir), default=0)
    if come_to > config.training.steps:
        raise UserError(
            f"{files.workdir} has a checkpoint of step {come_to}, but the plan is for {config.training.steps} steps: "
            "a run cannot be shortened; give the sweep a --workdir of its own"
        )
    changed = [key for key in _ASKED if begun.evaluation[key] != config.evaluation[key]]
    if changed and come_to == config.training.steps:
        _LOG.warning(
            "%s: evaluation.%s differs in the plan, but the run is finished; launch/evaluate.py --tasks measures it",
            files.name,
            changed[0],
        )


def _newest_metrics(files: RunFiles) -> dict[str, Any]:
    """The last value of each number, from the end of the run's metrics."""
    newest: dict[str, Any] = {}
    for line in tail(files.workdir / metrics.FILE).split("\n")[:-1]:
        with contextlib.suppress(ValueError):  # the first line may be cut off
            newest |= json.loads(line)
    return {"step": newest.get("step", 0)} | {
        key: newest.get(key) for key in ("loss", "heldout_loss", "tokens_per_second")
    }


def _reason(attempt: dict) -> str:
    status = attempt["status"]
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return attempt.get("error") or f"ended with status {status}"
