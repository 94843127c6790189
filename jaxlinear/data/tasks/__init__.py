"""Synthetic tasks by name: training sets and evaluations that are made from a seed, with nothing to download.

A difficulty is written ``NAME:option=VALUE:option=VALUE``; options that are left out have the defaults of the task's class.
"""

import dataclasses
from typing import Any

from jaxlinear.data.tasks.batches import TaskBatches
from jaxlinear.data.tasks.copying import SelectiveCopying
from jaxlinear.data.tasks.list_ops import ListOps
from jaxlinear.data.tasks.needle import PassKey
from jaxlinear.data.tasks.recall import InductionHeads, MultiQueryRecall
from jaxlinear.data.tasks.state_tracking import Parity, Permutations
from jaxlinear.data.tasks.task import NO_TARGET, Setting, Task
from jaxlinear.errors import UserError

__all__ = ["NO_TARGET", "TASKS", "Setting", "Task", "TaskBatches", "difficulties", "one", "split", "text"]

TASKS: dict[str, type[Task]] = {
    "mqar": MultiQueryRecall,
    "induction": InductionHeads,
    "passkey": PassKey,
    "selective_copying": SelectiveCopying,
    "parity": Parity,
    "s5_permutations": Permutations,
    "listops": ListOps,
}


def split(spec: str) -> tuple[str, dict[str, str]]:
    """The name in ``NAME:option=VALUE:...`` and its options."""
    name, *parts = spec.strip().split(":")
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{spec!r}: {part!r} is not an option; write NAME:option=VALUE:option=VALUE")
        options[option] = value
    return name, options


def text(task: Task) -> str:
    """The name with all options, which ``split`` reads again."""
    (name,) = (name for name, known in TASKS.items() if known is type(task))
    return ":".join([name, *(f"{option}={_written(value)}" for option, value in task.options().items())])


def one(spec: str, setting: Setting) -> Task:
    """The one difficulty that is trained on: of the run's length, options that are not given at their defaults."""
    name, options = split(spec)
    task = TASKS[name].make(TASKS[name].defaults(setting) | {"length": setting.sequence_length} | options)
    if task.length != setting.sequence_length:
        raise UserError(
            f"{spec}: length={task.length} is not training.sequence_length={setting.sequence_length}; leave length out"
        )
    return task


def difficulties(spec: str, setting: Setting, trained: Task | None = None) -> list[Task]:
    """The difficulties that a checkpoint is judged by: those of reference, each with the options that ``spec`` gives.

    If the run was trained on the task (``trained``), its own difficulty comes first, and its options hold where the
    reference has none. What the vocabulary of the model or the text is too small for is refused.
    """
    name, given = split(spec)
    task = TASKS[name]
    base = task.defaults(setting)
    own: list[dict[str, Any]] = []
    if isinstance(trained, task):
        base |= trained.options() | ({"split": setting.split} if "split" in base else {})
        own = [base]
    made = []
    for reference in [*own, *task.references(setting)]:
        difficulty = task.make(base | reference | given)
        if setting.vocab_size is not None and difficulty.vocabulary > setting.vocab_size:
            raise UserError(
                f"{name} takes {difficulty.vocabulary} tokens, and model.vocab_size is {setting.vocab_size}"
                + ("; set vocab_size" if "vocab_size" in _fields(task) else "")
            )
        if difficulty not in made:
            made.append(difficulty)
    return made


def _fields(task: type[Task]) -> list[str]:
    return [field.name for field in dataclasses.fields(task)]


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
