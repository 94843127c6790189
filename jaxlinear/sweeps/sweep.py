"""A sweep's directory: the plan is written before the first run starts and is read by later commands."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from jaxlinear import atomic
from jaxlinear import config as configs
from jaxlinear.errors import UserError
from jaxlinear.sweeps import plans, states
from jaxlinear.sweeps.files import RunFiles, hold
from jaxlinear.training import job, trained_data

FILE = "sweep.json"


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """``labels`` are the ``plans.LABELS`` that the run has."""

    files: RunFiles
    steps: int
    labels: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.files.name

    def progress(self, *, queued: bool = False) -> states.Progress:
        return states.read(self.files, self.steps, queued=queued)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A planned sweep: its directory, and its runs in the order of the plan."""

    directory: Path
    runs: tuple[PlannedRun, ...]


@contextlib.contextmanager
def prepare(directory: str | os.PathLike, config: config_dict.ConfigDict, runs: Sequence[plans.Run]) -> Iterator[Sweep]:
    """Checks every run, and writes the plan and the runs' configs. The sweep belongs to this process alone as long as the
    context lasts: a job reads its config when it starts, so nobody else may write the configs until the last one has.

    An existing sweep may now have more or fewer runs than before, and longer ones.

    Raises:
      UserError: a run cannot work, or has begun and would become another one, or has begun on data that were replaced
        since, or another process works on the sweep. Nothing has changed then.
    """
    if not runs:
        raise UserError("the sweep has no runs")
    sweep = Path(directory).absolute()
    names = plans.names(runs)
    resolved = [plans.resolve(config, run) for run in runs]
    for run, run_config in zip(runs, resolved, strict=True):
        plans.check_budget(run, run_config)
    _check_data(resolved)
    if os.path.lexists(sweep) and not sweep.is_dir():
        raise UserError(f"{sweep} is not a directory; give the sweep a --workdir of its own")
    atomic.make_directory(sweep)
    with hold(sweep) as held:
        if not held:
            raise UserError(f"another launch/sweep.py is running on {sweep}; --status shows its progress")
        planned = []
        kept = _kept(sweep, names, resolved)
        for name, run, run_config in zip(kept, runs, resolved, strict=True):
            files = RunFiles(sweep, name)
            states.check_unchanged(files, configs.to_json(run_config))
            if (files.workdir / trained_data.FILE).exists():
                trained_data.check(files.workdir, job.mixture(run_config.data.path))
            labels = {key: value for key, value in run.items() if key in plans.LABELS}
            planned.append(PlannedRun(files, run_config.training.steps, labels))
        for item, run_config in zip(planned, resolved, strict=True):
            item.files.job.mkdir(parents=True, exist_ok=True)
            atomic.write_text(item.files.config, configs.to_json(run_config))
        listed = [{"name": item.name, "steps": item.steps, "labels": dict(item.labels)} for item in planned]
        atomic.write_text(sweep / FILE, json.dumps({"runs": listed}, indent=2) + "\n")
        yield Sweep(sweep, tuple(planned))


def _kept(sweep: Path, names: Sequence[str], resolved: Sequence[config_dict.ConfigDict]) -> list[str]:
    """``names``, except that a run already in the sweep with the same config keeps its name: names state what runs differ
    in, so they change with the runs planned beside them."""
    paths = sorted(sweep.glob("jobs/*/config.json"))
    there = {path.parent.name: configs.to_json(configs.from_json(path.read_text(encoding="utf-8"))) for path in paths}
    kept: list[str] = []
    for name, config in zip(names, resolved, strict=True):
        text = configs.to_json(config)
        same = [known for known, other in there.items() if other == text and known not in kept]
        kept.append(name if name in same or not same else same[0])
    if len(set(kept)) < len(kept):
        twice = next(name for name in kept if kept.count(name) > 1)
        raise UserError(
            f"two runs would be named {twice}: one from an earlier plan and a new one; give the new one a label"
        )
    return kept


def read(directory: str | os.PathLike) -> Sweep:
    """The sweep in a directory."""
    sweep = Path(directory).absolute()
    if not (sweep / FILE).is_file():
        raise UserError(f"{directory} is not the directory of a sweep: it has no {FILE}")
    try:
        listed = json.loads((sweep / FILE).read_text(encoding="utf-8"))["runs"]
        planned = [PlannedRun(RunFiles(sweep, run["name"]), run["steps"], run["labels"]) for run in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{sweep / FILE} is damaged: {error}") from error
    return Sweep(sweep, tuple(planned))


def _check_data(resolved: Sequence[config_dict.ConfigDict]) -> None:
    """Checks configs against their data here and not in each run, where the same mistake would be made many times."""
    checked = set()
    for config in resolved:
        training, model, evaluation = config.training, config.model, config.evaluation
        shape = training.batch_size, training.microbatches, training.sequence_length
        read = (config.data.to_json(), *shape, model.vocab_size, evaluation.every_steps > 0)
        if read not in checked:
            job.check_data(config)
            checked.add(read)
