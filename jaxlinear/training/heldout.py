"""What is measured on held-out data while a run trains."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from jaxlinear import data
from jaxlinear.data import tasks
from jaxlinear.errors import UserError
from jaxlinear.parallel import feeding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import metrics
from jaxlinear.training.job import Job, rows_at_once
from jaxlinear.training.step import make_loss_step
from jaxlinear.training.task_evaluation import TaskEvaluator


def is_due(config: config_dict.ConfigDict, step: int) -> bool:
    """Whether the run is to be evaluated after ``step`` steps."""
    every = config.evaluation.every_steps
    return bool(every) and (step % every == 0 or step == config.training.steps)


def is_owed(config: config_dict.ConfigDict, workdir: Path, step: int) -> bool:
    """Whether a run that saved itself after ``step`` steps must still be evaluated there: it evaluates before it saves,
    unless SIGTERM ends the evaluation."""
    return is_due(config, step) and not any(
        line["step"] == step and "heldout_loss" in line for line in metrics.read(workdir)
    )


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """The bits per byte of a text, from its loss in nats per token."""
    return loss / math.log(2) * tokens_per_byte


def identity(path: str) -> str:
    """Identifies the held-out tokens of a dataset, wherever it is stored."""
    manifest = data.read_manifest(path)
    content = manifest.tokenizer.sha256, dataclasses.astuple(manifest.splits["heldout"])
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


class Evaluation:
    """The evaluation of a job. ``between`` is called before each batch, and may raise to end it."""

    def __init__(self, job: Job, between: Callable[[], None]):
        config = job.config
        self._job, self._between = job, between
        self._loss_step = make_loss_step(config, job.architecture, job.mesh)
        tokens = rows_at_once(config) * config.training.sequence_length
        self._answers = TaskEvaluator(config, job.architecture, job.mesh, tokens, between)
        self._tasks = job.evaluation_tasks() if config.evaluation.every_steps else []
        self._dataset = identity(job.heldout_path) if config.evaluation.every_steps and job.datasets else ""

    def __call__(self, parameters: dict[str, Any]) -> dict[str, float]:
        """``heldout_loss`` in nats per token, or per answer of the task that the run is trained on, together with bits per
        byte of text, or accuracies; then the accuracy on each difficulty of ``evaluation.tasks``."""
        config, trained = self._job.config, self._job.heldout_tasks()
        if not trained:
            values = self._text(parameters)
        else:
            found = self._measure(parameters, trained, config.evaluation.batches * config.training.batch_size)
            values = {f"heldout_{name}": found[name] for name in ("loss", "accuracy", "solved")}
        for task in self._tasks:
            accuracy = self._measure(parameters, [task], config.evaluation.examples)["accuracy"]
            values[f"{tasks.text(task)}/accuracy"] = accuracy
        return values

    @property
    def text(self) -> str:
        """Identifies what the loss is measured on, wherever it is stored: its tokens, and how many of them are used."""
        return f"{self._dataset} {self._job.config.evaluation.batches}"

    def _measure(self, parameters: dict[str, Any], asked: Sequence[tasks.Task], examples: int) -> dict[str, Any]:
        return self._answers.measure(parameters, asked, examples=examples, seed=self._job.config.training.seed)

    def _text(self, parameters: dict[str, Any]) -> dict[str, float]:
        job = self._job
        if identity(job.heldout_path) != self._dataset:
            raise UserError(
                f"the dataset in {job.heldout_path} was replaced by a new one while the run was evaluated on it; put the "
                "former one back, or give the resumed run another data.heldout_path"
            )
        sharding = meshes.batch_sharding(job.mesh)

        def sums():
            for batch in job.heldout_batches():
                self._between()
                placed = feeding.place(batch, sharding, rows_at_once(job.config))
                nll, targets = self._loss_step(parameters, placed)
                yield nll.sum(), targets.sum()

        total, count = 0.0, 0
        for nll, targets in feeding.one_behind(sums()):
            total += float(nll)
            count += int(targets)
        split = data.read_manifest(job.heldout_path).splits["heldout"]
        loss = total / count
        return {"heldout_loss": loss, "heldout_bits_per_byte": bits_per_byte(loss, split.tokens / split.bytes)}
