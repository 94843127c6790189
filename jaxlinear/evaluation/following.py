"""Evaluates every checkpoint of a run as it appears: reports as JSON, numbers to TensorBoard, curves on an HTML page."""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from jaxlinear import atomic, evaluation
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.errors import UserError
from jaxlinear.evaluation import html, plots
from jaxlinear.evaluation.options import Options
from jaxlinear.evaluation.run import Run, open_run
from jaxlinear.training import heldout
from jaxlinear.training.job import heldout_path
from jaxlinear.training.workdir import read_config, read_starts

_LOG = logging.getLogger(__name__)

PAGE = "index.html"
_LOOKS = 60  # looks, a second apart, at a checkpoint that may be being removed


def directory(workdir: str | os.PathLike) -> Path:
    """The directory of a run's reports (``STEP.json``), TensorBoard events and page."""
    return Path(workdir) / "evaluations"


def follow(
    workdir: str | os.PathLike,
    tasks: Sequence[str],
    options: Options,
    *,
    mesh: Sequence[str] = (),
    poll: float = 10.0,
    patience: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """The report of each checkpoint, oldest first, up to that of the run's last step. Each is written before it is given.

    Reports of earlier calls for the same checkpoint, tasks, options and held-out text are read, not made again, including
    those of checkpoints that the run has removed since. Checkpoints that the run removes before their turn are left out,
    and a line in the log says so. Looks every ``poll`` seconds. With ``patience`` above 0, also ends when no checkpoint has
    appeared for that many seconds.
    """
    evaluation.check_names(tasks)
    config = read_config(workdir)
    folder = directory(workdir)
    folder.mkdir(exist_ok=True)
    reports: dict[int, dict[str, Any]] = {}
    asked = _asked(config, tasks, options)
    past = _past_results(workdir, asked)
    run: Run | None = None
    removed: set[int] = set()
    newest: int | None = None  # at the last look
    seen = time.monotonic()
    while True:
        asked, starts = _asked(read_config(workdir), tasks, options), read_starts(workdir)
        # A run that was set back is no longer where these were made.
        reports = {
            step: report
            for step, report in reports.items()
            if not _was_set_back(report, folder / f"{step}.json", starts)
        }
        steps = _steps(workdir)
        if newest is not None:
            _name_those_that_passed(workdir, newest, steps, {*reports, *past, *removed})
        newest = max(steps, default=newest)
        for step in sorted({*steps, *past}):
            if step in removed:
                continue
            if step in past:
                reports[step] = past.pop(step)
                yield reports[step]
                continue
            try:
                # A run that was set back may have saved another checkpoint at the step that was evaluated.
                of_step = asked | {"checkpoint": Checkpoints(workdir).fingerprint(step)}
                if step in reports and reports[step]["asked"] == of_step:
                    continue
                report = _read(folder / f"{step}.json", of_step)
                if report is None:
                    begun = len(read_starts(workdir))  # counted before the checkpoint is read: it is of no later start
                    run = open_run(workdir, step, mesh) if run is None else run.at(step)
            except UserError:
                if not _is_removed(workdir, step):
                    raise
                if step in reports:
                    continue
                past = {n: report for n, report in _past_results(workdir, asked).items() if n not in reports}
                if step in past:
                    reports[step] = past.pop(step)
                    yield reports[step]
                else:
                    _LOG.warning("step %d was removed before it could be evaluated", step)
                    removed.add(step)
                continue
            if report is None:
                assert run is not None
                # By the config that it is evaluated with: the run may have resumed with another one since the look.
                of_step = _asked(run.config, tasks, options) | {"checkpoint": of_step["checkpoint"]}
                report = evaluation.evaluate_run(run, tasks, options) | {"asked": of_step, "starts": begun}
                # First the curves: a report that exists is not made again, so what it lacks it would lack for ever.
                _to_tensorboard(folder, step, report)
                atomic.write_text(folder / f"{step}.json", json.dumps(report, indent=2) + "\n")
            reports[step] = report
            atomic.write_text(folder / PAGE, _page(reports))
            yield report
            seen = time.monotonic()
        if any(step >= read_config(workdir).training.steps for step in (*reports, *removed)):
            return
        if patience and time.monotonic() - seen > patience:
            _LOG.warning("no new checkpoint for %.0f s", patience)
            return
        time.sleep(poll)


def _asked(config: config_dict.ConfigDict, tasks: Sequence[str], options: Options) -> dict[str, Any]:
    """What makes a report, apart from the checkpoint: the text may change when the run resumes."""
    asked = {"tasks": list(tasks), "options": json.loads(json.dumps(dataclasses.asdict(options)))}
    path = options.data or heldout_path(config)
    own = {task: evaluation.own_dataset(task) for task in tasks if evaluation.reads_text(task)}
    if path and not all(own.values()):
        asked["heldout_text"] = heldout.identity(path)
    if any(own.values()):
        asked["texts"] = {dataset: heldout.identity(dataset) for dataset in own.values() if dataset}
    return asked


def newest_report(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The report of the highest step in the run's final history; None if there is none."""
    starts = read_starts(workdir)
    paths = [path for path in directory(workdir).glob("*.json") if path.stem.isdigit()]
    for path in sorted(paths, key=lambda path: int(path.stem), reverse=True):
        report = json.loads(path.read_text(encoding="utf-8"))
        if not _was_set_back(report, path, starts):
            return report
    return None


def _steps(workdir: str | os.PathLike) -> list[int]:
    """The steps of the existing checkpoints; none before the run has made their directory."""
    try:
        return Checkpoints(workdir).steps()
    except UserError:
        return []


def _name_those_that_passed(workdir: str | os.PathLike, newest: int, steps: Sequence[int], known: set[int]) -> None:
    """Logs which checkpoints were due since the look that found ``newest``, and are gone already."""
    every = read_config(workdir).checkpoint.every_steps
    due = range(newest // every * every + every, max(steps, default=0), every)
    gone = [step for step in due if step not in steps and step not in known]
    if gone:
        _LOG.warning(
            "%d checkpoints, of steps %d to %d, were removed before they could be evaluated; checkpoint.keep_every_steps "
            "keeps more",
            *(len(gone), gone[0], gone[-1]),
        )


def _is_removed(workdir: str | os.PathLike, step: int) -> bool:
    """Whether a checkpoint that cannot be read has been removed or is being removed: a run removes it file by file, which
    may take a while. The newest one is never removed."""
    for _ in range(_LOOKS):
        steps = _steps(workdir)
        if step not in steps:
            return True
        if step == steps[-1]:
            return False
        time.sleep(1)
    return False


def _read(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier call, if it was made with the same ``asked``."""
    if not path.exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return report if report.get("asked") == asked else None


def _past_results(workdir: str | os.PathLike, asked: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The reports of earlier calls with the same ``asked`` for checkpoints that no longer exist. Left out are those made
    before the run restarted from an earlier step, and those of steps that it has not reached again."""
    steps, past, starts = _steps(workdir), {}, read_starts(workdir)
    for path in directory(workdir).glob("*.json"):
        if not path.stem.isdigit() or int(path.stem) in steps or int(path.stem) > max(steps, default=0):
            continue
        step, report = int(path.stem), json.loads(path.read_text(encoding="utf-8"))
        if _was_set_back(report, path, starts):
            continue
        if asked == {name: value for name, value in report.get("asked", {}).items() if name != "checkpoint"}:
            past[step] = report
    return past


def _was_set_back(report: Mapping[str, Any], path: Path, starts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the run restarted from an earlier step after a report was made. Reports count the starts before them; old
    ones that do not are judged by file times, although a copied directory is newer than all starts.
    """
    if "starts" in report:
        later = starts[report["starts"] :]
    else:
        made = path.stat().st_mtime
        later = [line for line in starts if datetime.datetime.fromisoformat(line["time"]).timestamp() > made]
    return any(line["step"] < int(path.stem) for line in later)


def _to_tensorboard(folder: Path, step: int, report: dict[str, Any]) -> None:
    from jaxlinear.training.tensorboard import TensorBoard  # imports torch if it can: not wanted by those who only read

    with contextlib.closing(TensorBoard(folder)) as board:
        for task, values in evaluation.scalars(report).items():
            board.write(step, {f"{task}/{name}": value for name, value in values.items()})


def _page(reports: Mapping[int, dict[str, Any]]) -> str:
    """Curves of every number over the steps, one figure for each name in a task, and the newest report."""
    steps = sorted(reports)
    newest = reports[steps[-1]]
    figures: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for step in steps:
        for task, values in evaluation.scalars(reports[step]).items():
            for name, value in values.items():
                what, _, where = name.partition(", ")
                figures.setdefault((task, what), {}).setdefault(where, {})[step] = value
    parts = [html.paragraph(f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}.")]
    for i, ((task, what), curves) in enumerate(figures.items()):
        svg = plots.to_svg(plots.step_curves(curves, what.replace("_", " ")))
        parts.append(html.figure(svg, f"{task}: {what.replace('_', ' ')}", name=f"figure{i}"))
    parts += [html.heading(f"Step {steps[-1]}"), html.preformatted(evaluation.table(newest))]
    return html.page(f"Evaluations of {Path(newest['workdir']).name}", *parts)
