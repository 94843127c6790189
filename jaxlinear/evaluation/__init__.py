"""Evaluation of trained models: tasks by name, each a function of a run and its options that returns a report."""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from jaxlinear import specs
from jaxlinear.data import tasks as synthetic_tasks
from jaxlinear.errors import UserError
from jaxlinear.evaluation.options import Options
from jaxlinear.evaluation.run import Run, open_run

__all__ = ["TASKS", "Options", "Run", "evaluate", "evaluate_run", "open_run", "scalars", "table"]

# The modules of the tasks: prepare(run, spec, options) -> a function that measures and returns the report, table(report) ->
# text, scalars(report) -> numbers by name. spec is NAME:option=VALUE:... prepare refuses everything that can be refused.
# Modules are imported on demand, since harness needs the extra eval.
TASKS: dict[str, str] = {
    "perplexity": "perplexity",
    **dict.fromkeys(synthetic_tasks.TASKS, "synthetic"),
    "harness": "harness",
}


def evaluate(
    workdir: str | os.PathLike,
    *,
    step: int | None = None,
    tasks: Sequence[str] = ("perplexity",),
    mesh: Sequence[str] = (),
    options: Options | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluates a checkpoint (the newest by default) on each task. Returns what ``--json`` writes.

    ``mesh`` is passed to ``open_run``: how all devices share the work. ``changes`` set fields of the ``options``, by name.
    Raises ``UserError`` before anything runs if something cannot be evaluated; only single texts of a harness task (e.g.
    one too long for full attention) are found on the way.
    """
    check_names(tasks)
    options = dataclasses.replace(options or Options(), **changes)
    return evaluate_run(open_run(workdir, step, mesh), tasks, options)


def evaluate_run(run: Run, tasks: Sequence[str], options: Options) -> dict[str, Any]:
    """``evaluate`` for a run that is already open."""
    measures = {spec: find(spec).prepare(run, spec, options) for spec in tasks}
    return run.summary() | {spec: measure() for spec, measure in measures.items()}


def scalars(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By task, the numbers of a report that are plotted over a run's steps, each named ``WHAT, WHERE``."""
    return {spec: find(spec).scalars(report[spec]) for spec in report if spec.split(":")[0] in TASKS}


def check_names(specs: Sequence[str]) -> None:
    """Raises ``UserError`` for a task that does not exist, or if no task is named."""
    if not specs:
        raise UserError(f"no task is given; the tasks are {', '.join(TASKS)}")
    for spec in specs:
        find(spec)


def reads_text(spec: str) -> bool:
    """Whether a task is measured on the held-out text of a dataset."""
    name = spec.split(":")[0]
    return name == "perplexity" or (name in synthetic_tasks.TASKS and synthetic_tasks.TASKS[name].READS_TEXT)


def own_dataset(spec: str) -> str:
    """The dataset that a task of ``reads_text`` names itself; "" if it names none."""
    return specs.split(spec)[1].get("dataset", "")


def find(spec: str) -> ModuleType:
    """The module of the task ``NAME:option=VALUE:...``."""
    name = spec.split(":")[0]
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return importlib.import_module(f"jaxlinear.evaluation.{TASKS[name]}")


def table(report: dict[str, Any]) -> str:
    """A report of ``evaluate`` as readable text."""
    model, training = report["model"], report["training"]
    head = (
        f"{report['workdir']}, step {report['step']} of {training['steps']}: {model['preset'] or 'a model'} of "
        f"{report['parameters']:,} parameters, trained at length {training['sequence_length']}"
    )
    parts = [head]
    for spec in report:
        if spec.split(":")[0] in TASKS:
            text = find(spec).table(report[spec])
            parts.append(text if spec == "perplexity" else f"{spec}: {text}")
    return "\n\n".join(parts)
