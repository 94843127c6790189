"""Layers compared on a synthetic task: each is trained from scratch in the same way, then evaluated."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear import evaluation, specs
from jaxlinear.data import tasks
from jaxlinear.errors import UserError
from jaxlinear.exit_status import FINISHED
from jaxlinear.training import loop
from jaxlinear.training.job import task_setting
from jaxlinear.training.workdir import read_config

FAMILIES = {"griffin": ("rg_lru", "rg_lru", "sliding_window"), "hawk": ("rg_lru",)}
_KINDS = (int, float, str)  # types of the keys that a pattern may set for itself


@dataclasses.dataclass(frozen=True)
class Row:
    """``seconds`` and ``cpu_seconds`` are this process's, including compilation and evaluation during training."""

    name: str
    parameters: int
    steps: int
    accuracy: float  # of the answers
    solved: float  # fraction of the examples whose answers are all right
    seconds: float
    cpu_seconds: float


def pattern(name: str) -> tuple[str, ...]:
    """The pattern for ``griffin``, ``hawk``, a mixer, or several as in ``rg_lru+sliding_window``."""
    return FAMILIES.get(name) or tuple(name.split("+"))


def split(spec: str) -> tuple[str, dict[str, str]]:
    """The pattern's name in ``NAME:section.key=VALUE:...`` and the config keys that it sets."""
    name, changes = specs.split(spec)
    configs.check_known(list(changes))
    return name, changes


def with_pattern(config: config_dict.ConfigDict, name: str, changes: Mapping[str, str]) -> config_dict.ConfigDict:
    """The config with that pattern, at the config's depth, and with the values of ``changes``, given as text. Settings that
    only the mixers of other patterns use are dropped."""
    config = config.copy_and_resolve_references()
    config.model.pattern = pattern(name)
    configs.forget_unread(config, ["model.pattern"])
    for key, text in changes.items():
        section, field = key.split(".")
        kind = configs.kind(key)
        if kind not in _KINDS:
            raise UserError(
                f"{name}: {key} is a {kind.__name__}; only keys that are numbers or names can be set for a pattern"
            )
        try:
            config[section][field] = kind(text)
        except ValueError:
            raise UserError(f"{name}: {key}={text} is not of type {kind.__name__}") from None
    if not config.data.task:
        raise UserError("data.task is not set: there is nothing to recall; configs/mqar.py sets it")
    return config


def check(config: config_dict.ConfigDict, specs: Sequence[str]) -> None:
    """Raises ``UserError``, before anything is trained, for a pattern that cannot be trained, and for two with the same
    name: they would share a directory, and the second would continue the first."""
    names = [split(spec)[0] for spec in specs]
    for spec, name in zip(specs, names, strict=True):
        if names.count(name) > 1:
            raise UserError(
                f"{name} is named {names.count(name)} times; run each separately with a --workdir of its own"
            )
        configs.resolve(with_pattern(config, name, split(spec)[1]))


def train(config: config_dict.ConfigDict, workdir: str | os.PathLike, spec: str, examples: int) -> Row | None:
    """Trains the pattern of ``spec`` in ``workdir/name``, or continues there, and measures it on ``examples`` held-out
    examples of its task; None if it was told to stop."""
    name, changes = split(spec)
    config, directory = with_pattern(config, name, changes), Path(workdir) / name
    begin, cpu = time.perf_counter(), time.process_time()
    if loop.train(config, directory) != FINISHED:
        return None
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    trained = read_config(directory)
    task = asked(trained)
    report = evaluation.evaluate(directory, tasks=[task], examples=examples)
    (found,) = report[task]["difficulties"]
    return Row(name, report["parameters"], trained.training.steps, found["accuracy"], found["solved"], seconds, cpu)


def asked(config: config_dict.ConfigDict) -> str:
    """The last difficulty that a run is trained on, as an evaluation task with the run's other options and held-out text.
    It gives every option that the references vary, so none of them is evaluated too."""
    last = tasks.training_set(config.data.task, task_setting(config, "train"))[-1]
    varied = {"length"}.union(*last.REFERENCE)
    given = (f"{name}={value}" for name, value in last.options().items() if name in varied)
    return ":".join([tasks.split(config.data.task)[0], *given])


def table(task: str, rows: Sequence[Row]) -> str:
    """The rows as readable text."""
    lines = [task, f"{'':<20}{'parameters':>11}{'steps':>7}{'accuracy':>10}{'solved':>9}{'seconds':>9}{'CPU':>7}"]
    lines += [
        f"{row.name:<20}{row.parameters:>11,}{row.steps:>7,}{row.accuracy:>10.2%}{row.solved:>9.2%}{row.seconds:>9.0f}"
        f"{row.cpu_seconds:>7.0f}"
        for row in rows
    ]
    return "\n".join(lines)
