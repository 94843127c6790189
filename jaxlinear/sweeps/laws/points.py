"""The results of a finished sweep: the parameters, tokens, FLOPs and held-out loss of each run."""

import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear import data
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.data import tasks
from jaxlinear.errors import UserError
from jaxlinear.evaluation import following
from jaxlinear.models import flops
from jaxlinear.models.parameters import describe
from jaxlinear.sweeps import states
from jaxlinear.sweeps.files import RunFiles
from jaxlinear.sweeps.sweep import PlannedRun, Sweep, read
from jaxlinear.training import heldout, metrics
from jaxlinear.training.job import heldout_path, task_setting
from jaxlinear.training.workdir import read_config, read_starts

_LOG = logging.getLogger(__name__)
_NO_ARCHITECTURE = ("preset", "remat", "kernels")  # keys of a model that do not change what it computes
COUNTS = {"with": "with embeddings", "without": "without embeddings"}


@dataclasses.dataclass(frozen=True)
class Point:
    """A run at its end. FLOPs are forward and backward; ``budget`` is that of an isoFLOP ladder, and ``budget_counts`` says
    by which of ``COUNTS`` it was counted. ``loss`` is over the first ``heldout_tokens`` tokens (0: all) of
    ``heldout_data``, which is the directory of a dataset, or the difficulties of a task. ``heldout_text`` identifies the
    text as it was then, if that is recorded."""

    name: str
    architecture: str
    parameters: int
    embedding_parameters: int
    tokens: int
    flops_per_token: float
    logits_flops_per_token: float
    loss: float
    budget: float | None = None
    budget_counts: str | None = None
    heldout_data: str = ""
    heldout_tokens: int = 0
    heldout_text: str = ""

    def size(self, counts: str) -> int:
        """N by one of ``COUNTS``: all parameters, or those outside the embeddings."""
        return self.parameters - (self.embedding_parameters if counts == "without" else 0)

    def token_flops(self, counts: str) -> float:
        """FLOPs per token: all, or without those of the logits."""
        return self.flops_per_token - (self.logits_flops_per_token if counts == "without" else 0)

    def flops(self, counts: str) -> float:
        """FLOPs of the whole run, by one of ``COUNTS``."""
        return float(self.tokens * self.token_flops(counts))  # the formulas give integers beyond 64 bits

    @property
    def diverged(self) -> bool:
        """Whether the loss is not finite, so that nothing can be fitted to it."""
        return not math.isfinite(self.loss)


def sweep_points(workdir: str | os.PathLike, *, partial: bool = False, evaluated: bool = False) -> list[Point]:
    """The runs of the sweep in ``workdir``. Of runs with the same architecture, size and tokens, only the one with the
    lowest loss is taken, so that a sweep may try several learning rates; runs that diverged are always included. Losses are
    those that the runs logged or, with ``evaluated``, those of ``launch/evaluate.py --follow``.

    Raises:
      UserError: a run is not finished (with ``partial`` it is left out) or has no held-out loss at its end, or two losses
        are for different text.
    """
    sweep = read(workdir)
    unfinished = _unfinished(sweep)
    if unfinished and (not partial or len(unfinished) == len(sweep.runs)):
        first = unfinished[0]
        raise UserError(
            f"{len(unfinished)} of the {len(sweep.runs)} runs in {workdir} are not finished, {first.name} "
            f"({first.progress().state}) among them; launch/sweep.py continues them, --partial leaves them out"
        )
    names = {run.name for run in unfinished}
    if names:
        _LOG.info("%d of the %d runs in %s are not finished and are left out", len(names), len(sweep.runs), workdir)
    runs = [run for run in sweep.runs if run.name not in names]
    trained = [read_config(run.files.workdir) for run in runs]
    architectures = _architectures(runs, [config.model for config in trained])
    made = [_point(*of_run) for of_run in zip(runs, trained, architectures, strict=True)]
    if evaluated:
        made = [_evaluated(point, workdir) for point in made]
    _check_same_text([point for point in made if not point.diverged])
    return best(made)


def unfinished(workdir: str | os.PathLike) -> list[str]:
    """The names and the states of the runs that ``sweep_points`` leaves out with ``partial``."""
    return [f"{run.name} ({run.progress().state})" for run in _unfinished(read(workdir))]


def _unfinished(sweep: Sweep) -> list[PlannedRun]:
    return [run for run in sweep.runs if not states.is_finished(run.files, run.steps)]


def best(points: Sequence[Point]) -> list[Point]:
    """For each architecture, size and number of tokens, the point with the lowest loss; then all that diverged."""
    kept: dict[tuple, Point] = {}
    for point in points:
        if point.diverged:
            continue
        key = (point.architecture, point.parameters, point.tokens)
        if key not in kept or point.loss < kept[key].loss:
            kept[key] = point
    return [*kept.values(), *(point for point in points if point.diverged)]


def _check_same_text(points: Sequence[Point]) -> None:
    """Raises ``UserError`` if losses are for different text (other data, or more of the same): such losses neither show
    which run is better nor follow a law."""
    manifests = {path: _manifest(path) for path in {point.heldout_data for point in points}}
    present = {path: heldout.identity(path) for path, manifest in manifests.items() if manifest}

    def measured(point: Point) -> tuple[data.Manifest | str, str, int]:
        path, manifest = point.heldout_data, manifests[point.heldout_data]
        if manifest is None:
            return path, point.heldout_text, point.heldout_tokens
        whole = manifest.splits["heldout"].tokens - 1  # the first token is not a target
        return manifest, point.heldout_text or present[path], min(point.heldout_tokens or whole, whole)

    def said(point: Point) -> str:
        path, (_, text, count) = point.heldout_data, measured(point)
        former = " as it was before it was prepared again" if text != present.get(path, text) else ""
        return f"{f'{count:,}' if count else 'all'} tokens of {path}{former}"

    for point in points:
        if measured(point) != measured(points[0]):
            raise UserError(
                f"the held-out losses are of different text: {points[0].name} has {said(points[0])}, {point.name} has "
                f"{said(point)}; train a sweep whose runs have the same data.heldout_path and evaluation.batches x "
                "training.batch_size x training.sequence_length, or evaluation.batches=0 (all of it); for finished "
                "runs, measure each with launch/evaluate.py --follow and use its losses with --evaluated"
            )


def _manifest(path: str) -> data.Manifest | None:
    """The manifest; None for a task, or for a dataset that no longer exists."""
    try:
        return data.read_manifest(path)
    except UserError:
        return None


def _architectures(runs: Sequence[PlannedRun], models: Sequence[config_dict.ConfigDict]) -> list[str]:
    """The label of each run. Without one, the names of its mixers and, if the models with these mixers differ in more than
    numbers, what distinguishes them: a law is for one architecture."""
    unlabelled = [model for run, model in zip(runs, models, strict=True) if not run.labels.get("architecture")]

    def mixers(model: config_dict.ConfigDict) -> str:
        return "+".join(dict.fromkeys(model.pattern))

    def name(model: config_dict.ConfigDict) -> str:
        alike = [other for other in unlabelled if mixers(other) == mixers(model)]
        parts = [mixers(model)]
        if len({_period(other.pattern) for other in alike}) > 1:
            groups = [(mixer, len(list(group))) for mixer, group in itertools.groupby(_period(model.pattern))]
            parts = ["+".join(mixer if count == 1 else f"{count} {mixer}" for mixer, count in groups)]
        for key, value in model.items():
            told_apart = isinstance(value, bool | str) and any(other[key] != value for other in alike)
            if told_apart and key not in _NO_ARCHITECTURE:
                parts.append(f"{key}={value}")
        return " ".join(parts)

    return [run.labels.get("architecture") or name(model) for run, model in zip(runs, models, strict=True)]


def _period(pattern: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that gives the same layers when repeated."""
    whole = tuple(pattern)
    lengths = (length for length in range(1, len(whole) + 1) if len(whole) % length == 0)
    return next(whole[:length] for length in lengths if whole[:length] * (len(whole) // length) == whole)


def _point(run: PlannedRun, config: config_dict.ConfigDict, architecture: str) -> Point:
    training = config.training
    lines = [line for line in metrics.read(run.files.workdir) if line["step"] == training.steps]
    losses = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    if not losses:
        raise UserError(f"the run {run.name} has no held-out loss at its end: train it with evaluation.every_steps")
    model = configs.model_config(config)
    described = describe(model)
    counted = [
        flops.training_flops_per_token(model, training.sequence_length, logits=logits) for logits in (True, False)
    ]
    return Point(
        name=run.name,
        architecture=architecture,
        parameters=described.num_parameters,
        embedding_parameters=described.num_embedding_parameters,
        tokens=training.steps * training.batch_size * training.sequence_length,
        flops_per_token=counted[0],
        logits_flops_per_token=counted[0] - counted[1],
        loss=losses[-1],
        budget=run.labels.get("budget"),
        budget_counts=run.labels.get("budget_counts"),
        heldout_data=_difficulties(config) if config.data.task else heldout_path(config),
        heldout_tokens=config.evaluation.batches * training.batch_size * training.sequence_length,
        heldout_text="" if config.data.task else _text(run.files.workdir),
    )


def _difficulties(config: config_dict.ConfigDict) -> str:
    """Those of the task that a run is trained and judged on."""
    return " ".join(map(tasks.text, tasks.training_set(config.data.task, task_setting(config, "train"))))


def _text(workdir: Path) -> str:
    """``heldout.identity`` of the text that a run's last losses are of; "" if it was not recorded."""
    recorded = [line["heldout_text"] for line in read_starts(workdir) if "heldout_text" in line]
    return recorded[-1].split(" ")[0] if recorded else ""


def _evaluated(point: Point, sweep: str | os.PathLike) -> Point:
    """The point with the loss from the evaluation of the run's last checkpoint, at the length it was trained with."""
    if point.diverged:
        return point
    workdir = RunFiles(Path(sweep), point.name).workdir
    step = read_config(workdir).training.steps
    path = following.directory(workdir) / f"{step}.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = report.get("perplexity", {"lengths": []})
    rows = [row for row in found["lengths"] if row["multiple"] == 1]
    if not rows or report.get("asked", {}).get("checkpoint") != Checkpoints(workdir).fingerprint(step):
        raise UserError(
            f"the run {point.name} has no report of its last checkpoint's loss: launch/evaluate.py --workdir={workdir} "
            "--follow makes it"
        )
    return dataclasses.replace(
        point,
        loss=rows[0]["loss"],
        heldout_data=found["dataset"],
        heldout_tokens=rows[0]["tokens"],
        heldout_text=report["asked"].get("heldout_text", ""),
    )
