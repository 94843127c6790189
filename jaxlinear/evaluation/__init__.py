"""What a trained model is worth: tasks by name, each a function of a run and its options that returns a report."""

import os
from collections.abc import Sequence
from typing import Any

from jaxlinear.errors import UserError
from jaxlinear.evaluation import perplexity
from jaxlinear.evaluation.run import Run, open_run

__all__ = ["TASKS", "Run", "evaluate", "open_run", "table"]

TASKS = {"perplexity": perplexity}  # modules with evaluate(run, **options) -> report and table(report) -> text


def evaluate(
    workdir: str | os.PathLike,
    *,
    step: int | None = None,
    tasks: Sequence[str] = ("perplexity",),
    mesh: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a checkpoint (the newest by default) on each task. Returns what ``--json`` writes.

    ``mesh`` is what ``open_run`` takes: how all devices share the work.

    ``options`` are those of ``perplexity.evaluate``. ``UserError`` says what cannot be evaluated, before anything runs.
    """
    if not tasks:
        raise UserError(f"no task is named; there are {', '.join(TASKS)}")
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    run = open_run(workdir, step, mesh)
    return run.summary() | {name: TASKS[name].evaluate(run, **options) for name in tasks}


def table(report: dict[str, Any]) -> str:
    """A report of ``evaluate`` as text for people."""
    model, training = report["model"], report["training"]
    head = (
        f"{report['workdir']}, step {report['step']} of {training['steps']}: {model['preset'] or 'a model'} of "
        f"{report['parameters']:,} parameters, trained at length {training['sequence_length']}"
    )
    return "\n\n".join([head, *(TASKS[name].table(report[name]) for name in TASKS if name in report)])
