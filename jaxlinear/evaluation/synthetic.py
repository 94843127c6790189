"""Accuracy of a checkpoint on the synthetic tasks (``jaxlinear.data.tasks``), by difficulty."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from jaxlinear import data
from jaxlinear.data import tasks
from jaxlinear.errors import UserError
from jaxlinear.evaluation.options import Options
from jaxlinear.evaluation.run import Run
from jaxlinear.training import trained_data
from jaxlinear.training.job import task_setting
from jaxlinear.training.task_evaluation import TaskEvaluator


def prepare(run: Run, spec: str, options: Options) -> Callable[[], dict[str, Any]]:
    """A function that measures the accuracies. ``spec`` is ``NAME:option=VALUE:...``: the reference difficulties with these
    options, preceded by that of the training if the run was trained on the task."""
    if options.examples < 1:
        raise UserError(f"examples={options.examples} must be at least 1")
    training = run.config.training
    setting = task_setting(run.config, "heldout")
    if options.data:
        setting = dataclasses.replace(setting, dataset=options.data)
    trained = (
        tasks.training_set(run.config.data.task, task_setting(run.config, "train")) if run.config.data.task else ()
    )
    difficulties = tasks.difficulties(spec, setting, trained)
    for task in difficulties:
        if task.READS_TEXT:
            dataset = task.options()["dataset"]
            trained_data.check_tokenizer(run.workdir, dataset, data.read_manifest(dataset))
    batch_tokens = run.batch_tokens(options.batch_tokens)
    answers = run.program(
        ("answers", batch_tokens), lambda: TaskEvaluator(run.config, run.architecture, run.mesh, batch_tokens)
    )
    for task in difficulties:
        answers.plan(task.length, options.examples)  # refuses a length that the mesh does not divide

    def measure() -> dict[str, Any]:
        rows = []
        for task in difficulties:
            begin = time.perf_counter()
            found = answers.measure(run.parameters, [task], examples=options.examples, seed=training.seed)
            if not math.isfinite(found["loss"]):
                raise UserError(
                    f"the loss of {run.workdir} at step {run.step} on {tasks.text(task)} is {found['loss']}: the model's "
                    "own values are not finite; try an earlier checkpoint (--step)"
                )
            rows.append(
                {
                    "options": task.options(),
                    "trained": any(_same(task, known) for known in trained),
                    "chance": task.chance,
                }
                | found
                | {"seconds": time.perf_counter() - begin}
            )
        return {"source": difficulties[0].SOURCE, "difficulties": rows}

    return measure


def _same(task: tasks.Task, trained: tasks.Task) -> bool:
    """Whether this is a difficulty that was trained on, ignoring the split of the text."""
    if type(task) is not type(trained):
        return False
    ignored = ("dataset", "split")
    return all(value == trained.options()[name] for name, value in task.options().items() if name not in ignored)


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """The numbers plotted over a run's steps."""
    rows, varying = report["difficulties"], _varying(report)
    named = [", ".join(f"{name} {row['options'][name]}" for name in varying) for row in rows]
    return {f"accuracy, {name}": row["accuracy"] for name, row in zip(named, rows, strict=True)}


def _varying(report: dict[str, Any]) -> list[str]:
    """The options in which the difficulties differ."""
    rows = report["difficulties"]
    return [name for name in rows[0]["options"] if len({row["options"][name] for row in rows}) > 1] or ["length"]


def table(report: dict[str, Any]) -> str:
    """A report of ``evaluate`` as readable text: the options that differ are columns, the others are listed above."""
    rows, varying = report["difficulties"], _varying(report)
    names = list(rows[0]["options"])
    fixed = ", ".join(f"{name} {rows[0]['options'][name]}" for name in names if name not in varying)
    lines = [report["source"]] + ([fixed] if fixed else [])
    lines.append(
        "".join(f"{name:>12}" for name in varying) + f"{'accuracy':>10}{'chance':>9}{'solved':>9}{'examples':>10}"
    )
    for row in rows:
        lines.append(
            "".join(f"{row['options'][name]:>12}" for name in varying)
            + f"{row['accuracy']:>10.4f}{row['chance']:>9.4f}{row['solved']:>9.4f}{row['examples']:>10}"
            + ("  (as trained)" if row["trained"] else "")
        )
    return "\n".join(lines)
