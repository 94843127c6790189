"""Synthetic tasks by name: training sets and evaluations generated from a seed, with nothing to download.

A difficulty is written ``NAME:option=VALUE:option=VALUE``. Options left out have the defaults of the task's class.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from jaxlinear import specs
from jaxlinear.data.tasks.batches import TaskBatches
from jaxlinear.data.tasks.copying import SelectiveCopying
from jaxlinear.data.tasks.list_ops import ListOps
from jaxlinear.data.tasks.needle import PassKey
from jaxlinear.data.tasks.recall import InductionHeads, MultiQueryRecall
from jaxlinear.data.tasks.state_tracking import Parity, Permutations
from jaxlinear.data.tasks.task import NO_TARGET, Setting, Task
from jaxlinear.errors import UserError

__all__ = ["NO_TARGET", "TASKS", "Setting", "Task", "TaskBatches", "difficulties", "split", "text", "training_set"]

_TASKS = (MultiQueryRecall, InductionHeads, PassKey, SelectiveCopying, Parity, Permutations, ListOps)
TASKS: dict[str, type[Task]] = {task.NAME: task for task in _TASKS}


def split(spec: str) -> tuple[str, dict[str, str]]:
    """The name in ``NAME:option=VALUE:...`` and its options."""
    name, options = specs.split(spec)
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return name, options


def text(task: Task) -> str:
    """The name with all options, in the form that ``split`` reads."""
    written = {name: str(value).lower() if isinstance(value, bool) else value for name, value in task.options().items()}
    return ":".join([task.NAME, *(f"{option}={value}" for option, value in written.items())])


def training_set(spec: str, setting: Setting) -> tuple[Task, ...]:
    """What to train on: one difficulty at the run's length, or several, as in ``mqar:pairs=2+4+8``."""
    name, given = split(spec)
    defaults = TASKS[name].defaults(setting) | {"length": setting.sequence_length}
    made = tuple(TASKS[name].make(defaults | options) for options in _alternatives(TASKS[name], given))
    for task in made:
        if task.length != setting.sequence_length:
            raise UserError(
                f"{spec}: length={task.length} differs from training.sequence_length={setting.sequence_length}; "
                "leave length out"
            )
    return made


def difficulties(spec: str, setting: Setting, trained: Sequence[Task] = ()) -> list[Task]:
    """The difficulties on which a checkpoint is evaluated: the reference ones with the options in ``spec`` or, if it gives
    one that the references vary, only those of ``spec``. A number may be several, ``pairs=4+8``.

    If the run was trained on the task (``trained``), the options of its last difficulty are the defaults, and all its
    difficulties precede the reference ones. Those too large for the model's vocabulary or the text are refused.
    """
    name, given = split(spec)
    task = TASKS[name]
    text = {"dataset": setting.dataset, "split": setting.split} if task.READS_TEXT else {}
    own = tuple(known.options() | text for known in trained if isinstance(known, task))
    base = own[-1] if own else task.defaults(setting)
    references = task.references(setting, set(given))
    if references != ({},):
        references = (*own, *references)
    made = []
    for reference, options in itertools.product(references, _alternatives(task, given)):
        difficulty = task.make(base | reference | options)
        if setting.vocab_size is not None and difficulty.vocabulary > setting.vocab_size:
            raise UserError(
                f"{name} needs {difficulty.vocabulary} tokens, but model.vocab_size is {setting.vocab_size}"
                + ("; set vocab_size" if "vocab_size" in difficulty.options() else "")
            )
        if difficulty not in made:
            made.append(difficulty)
    return made


def _alternatives(task: type[Task], given: dict[str, str]) -> list[dict[str, str]]:
    """Every combination of the values given for the options."""
    texts = {field.name for field in dataclasses.fields(task) if field.type in (str, "str")}
    values = [[value] if name in texts else value.split("+") for name, value in given.items()]
    return [dict(zip(given, chosen, strict=True)) for chosen in itertools.product(*values)]
