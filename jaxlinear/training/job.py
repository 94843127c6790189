"""What a run's config fixes: the model, the mesh, the data and the optimiser, checked against one another."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear import data
from jaxlinear.data import tasks
from jaxlinear.errors import UserError
from jaxlinear.models import mixers, parameters
from jaxlinear.parallel import feeding, sharding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training.optimizer import make_optimizer
from jaxlinear.training.task_evaluation import check_length


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything about a run that its config fixes: nothing here depends on the step."""

    config: config_dict.ConfigDict
    architecture: parameters.Architecture
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    batches: data.TrainBatches | tasks.TaskBatches

    @classmethod
    def build(cls, config: config_dict.ConfigDict) -> "Job":
        """Checks the config against the devices and the data; writes nothing. ``UserError`` says what does not fit."""
        config = configs.resolve(config)
        mesh = meshes.make_mesh(config.mesh)
        check_mesh(config, mesh)
        shape = (config.training.batch_size, config.training.sequence_length)
        batches = _open_batches(config, feeding.local_rows(meshes.batch_sharding(mesh), shape))
        config = _with_vocabulary(config, batches.vocab_size)
        _check_vocabulary(config, mesh)
        architecture = parameters.describe(configs.model_config(config))
        job = cls(config, architecture, mesh, make_optimizer(config, architecture), batches)
        if config.data.heldout_path:
            job._check_heldout_text_is_read()
            job._check_same_tokenizer(config.data.heldout_path)
            for path in job.texts:
                paths = [path, config.data.heldout_path]
                data.warn_of_splits(paths, [data.read_manifest(one) for one in paths])
        if config.evaluation.every_steps:
            if not config.data.task:
                job.heldout_batches()
            for task in [*job.heldout_tasks(), *job.evaluation_tasks()]:
                check_length(task.length, mesh)
        return job

    @property
    def datasets(self) -> dict[str, float]:
        """Weights by directory; empty if the data are generated."""
        return mixture(self.config.data.path)

    @property
    def texts(self) -> dict[str, float]:
        """``datasets``, together with the text that a task is given to read."""
        read = [task.options()["dataset"] for task in self.trained_tasks if task.READS_TEXT]
        return self.datasets | {path: 1.0 for path in read if path not in self.datasets}

    @property
    def heldout_path(self) -> str:
        return heldout_path(self.config)

    @property
    def trained_tasks(self) -> tuple[tasks.Task, ...]:
        """The difficulties of the synthetic task that the run is trained on, if any."""
        return self.batches.tasks if isinstance(self.batches, tasks.TaskBatches) else ()

    def heldout_tasks(self) -> list[tasks.Task]:
        """``trained_tasks`` as the run is judged by them: their text is held out, and refused if there is too little."""
        return [_held_out(task, self.heldout_path) for task in self.trained_tasks]

    def evaluation_tasks(self) -> list[tasks.Task]:
        """The difficulties of ``evaluation.tasks``."""
        setting = task_setting(self.config, "heldout")
        specs = self.config.evaluation.tasks
        found = [task for spec in specs for task in tasks.difficulties(spec, setting, self.trained_tasks)]
        for task in found:
            if task.READS_TEXT:
                self._check_same_tokenizer(task.options()["dataset"])
        return found

    def _check_heldout_text_is_read(self) -> None:
        judged_by = [*self.trained_tasks, *self.evaluation_tasks()]
        if self.config.data.task and not any(task.READS_TEXT for task in judged_by):
            raise UserError(
                f"data.task={self.config.data.task} takes no text, and neither do the evaluation.tasks, but "
                f"data.heldout_path={self.config.data.heldout_path} is set; leave it out"
            )

    def _check_same_tokenizer(self, path: str) -> None:
        """Requires the tokenizer of the training data: numbers in other tokens would mean nothing."""
        if self.texts:
            paths = [next(iter(self.texts)), path]
            data.check_same_tokenizer(paths, [data.read_manifest(one) for one in paths])

    def data_text(self) -> str:
        """A description of the data, for processes to compare."""
        paths = [*self.texts, *([self.heldout_path] if self.heldout_path else [])]
        return repr((self.trained_tasks, [data.read_manifest(path) for path in paths]))

    def heldout_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the held-out batches that are evaluated during training, one microbatch at a time."""
        shape = (rows_at_once(self.config), self.config.training.sequence_length)
        return _heldout_batches(self.config, feeding.local_rows(meshes.batch_sharding(self.mesh), shape))


def _held_out(task: tasks.Task, heldout: str) -> tasks.Task:
    if not task.READS_TEXT:
        return task
    changes: dict[str, Any] = {"split": "heldout", "dataset": heldout or task.options()["dataset"]}
    return dataclasses.replace(task, **changes)


def heldout_path(config: config_dict.ConfigDict) -> str:
    """The dataset whose held-out split a run is judged by; empty if no data are named."""
    return config.data.heldout_path or next(iter(mixture(config.data.path)), "")


def mixture(path: str) -> dict[str, float]:
    """``DIR`` or ``DIR=WEIGHT,DIR=WEIGHT`` as weights by directory; nothing as none."""
    if not path:
        return {}
    weights = {}
    places = set()
    for part in path.split(","):
        name, equals, weight = part.partition("=")
        if not name.strip():
            raise UserError(f"data.path: {path!r} has an entry without a directory; write DIR=WEIGHT,DIR=WEIGHT")
        place = os.path.realpath(name.strip())
        if place in places:  # however it is spelled
            raise UserError(f"data.path names {name.strip()} twice; give it one weight")
        places.add(place)
        try:
            weights[name.strip()] = float(weight) if equals else 1.0
        except ValueError:
            raise UserError(f"data.path: {weight!r} is not a weight; write DIR=WEIGHT,DIR=WEIGHT") from None
        if not 0 < weights[name.strip()] < math.inf:  # this also refuses NaN
            raise UserError(f"data.path: the weight {weight} of {name.strip()} must be above 0 and finite")
    return weights


def rows_at_once(config: config_dict.ConfigDict) -> int:
    """How many rows of a batch the devices have room for at once, in training and in evaluations."""
    return config.training.batch_size // config.training.microbatches


def task_setting(config: config_dict.ConfigDict, split: str) -> tasks.Setting:
    """The setting that a run gives its tasks."""
    dataset = heldout_path(config) if split == "heldout" else next(iter(mixture(config.data.path)), "")
    return tasks.Setting(config.training.sequence_length, config.model.vocab_size, dataset, split)


def check_data(config: config_dict.ConfigDict) -> None:
    """The checks of a resolved config against its data that need no devices; ``Job.build`` makes them too."""
    _with_vocabulary(config, _open_batches(config).vocab_size)
    if config.evaluation.every_steps and not config.data.task:
        _heldout_batches(config)


def _open_batches(
    config: config_dict.ConfigDict, rows: Sequence[int] | None = None
) -> data.TrainBatches | tasks.TaskBatches:
    """The training batches: these rows, or all, of every global batch."""
    training = config.training
    if config.data.task:
        if len(mixture(config.data.path)) > 1:
            raise UserError(
                f"data.task={config.data.task} reads one dataset at most, but data.path={config.data.path} names several; "
                "name one"
            )
        made = tasks.training_set(config.data.task, task_setting(config, "train"))
        if config.data.path and not made[0].READS_TEXT:
            raise UserError(
                f"data.task={config.data.task} takes no text, but data.path={config.data.path} is set; leave one out"
            )
        if config.data.path and made[0].options()["dataset"] not in mixture(config.data.path):
            raise UserError(
                f"data.task={config.data.task} has a dataset of its own, but data.path={config.data.path} is set; "
                "leave one out"
            )
        return tasks.TaskBatches(
            made,
            batch_size=training.batch_size,
            seed=training.seed,
            rows=rows,
        )
    if not config.data.path:
        raise UserError("data.path is not set; launch/prepare_data.py makes a dataset, and data.task needs none")
    return data.TrainBatches(
        mixture(config.data.path),
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        seed=training.seed,
        rows=rows,
    )


def _heldout_batches(
    config: config_dict.ConfigDict, rows: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The held-out batches that are evaluated during training, one microbatch at a time: these rows of each, or all."""
    return data.heldout_batches(
        heldout_path(config),
        batch_size=rows_at_once(config),
        sequence_length=config.training.sequence_length,
        rows=rows,
        limit=config.evaluation.batches * config.training.microbatches or None,
    )


def with_vocabulary_of_data(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    """The resolved config with ``model.vocab_size`` as ``Job.build`` sets it, read only from what describes the data."""
    if config.model.vocab_size is not None:
        return config
    advice = "set model.vocab_size, or name existing data with data.path or data.task"
    if config.data.task:
        sizes = [task.vocabulary for task in tasks.training_set(config.data.task, task_setting(config, "train"))]
    elif config.data.path:
        try:
            sizes = [data.read_manifest(path).vocab_size for path in mixture(config.data.path)]
        except UserError as error:
            raise UserError(f"model.vocab_size is not set and follows the data: {error}; {advice}") from error
    else:
        raise UserError(f"model.vocab_size is not set and follows the data, but no data are named; {advice}")
    return _with_vocabulary(config, max(sizes))


def _with_vocabulary(config: config_dict.ConfigDict, vocab_size: int) -> config_dict.ConfigDict:
    """The config with ``model.vocab_size`` set for data of ``vocab_size`` tokens; ``UserError`` if it is too small."""
    config = config.copy_and_resolve_references()
    if config.model.vocab_size is None:
        config.model.vocab_size = math.ceil(vocab_size / 128) * 128
    if config.model.vocab_size < vocab_size:
        what = config.data.task or f"the tokenizer of {config.data.path}"
        raise UserError(
            f"{what} has {vocab_size} tokens, more than model.vocab_size="
            f"{config.model.vocab_size}; leave model.vocab_size unset to follow the data"
        )
    return config


def check_mesh(config: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ``UserError`` unless the mesh divides the rows of a microbatch, their length, the experts and, if it is known,
    the vocabulary of a resolved config."""
    rows = rows_at_once(config)
    axes = sharding.RULES["batch"]
    parts = sharding.parts_on(mesh.shape, "batch")
    if rows % parts:
        raise UserError(
            f"training.batch_size={config.training.batch_size} in {config.training.microbatches} microbatches gives "
            f"{rows} rows, which the mesh ({' x '.join(f'{axis} {mesh.shape[axis]}' for axis in axes)}) does not "
            "divide; the nearest batch size that works is "
            f"{max(1, round(rows / parts)) * parts * config.training.microbatches}"
        )
    length, shards = config.training.sequence_length, mesh.shape["sequence"]
    if length % shards:
        raise UserError(
            f"mesh.sequence={shards} does not divide training.sequence_length={length}; the nearest length that works "
            f"is {max(1, round(length / shards)) * shards}"
        )
    mixers.check_over_sequence(config.model.pattern[: config.model.num_layers], shards)
    model, shards = config.model, mesh.shape["expert"]
    if shards > 1 and model.channel_mixer != "mixture_of_experts":
        raise UserError(
            f"mesh.expert={shards}: the model has no experts (model.channel_mixer is {model.channel_mixer!r}); set it to 1"
        )
    if shards > 1 and model.experts % shards:
        raise UserError(f"mesh.expert={shards} does not divide model.experts={model.experts}")
    if model.vocab_size is not None:  # otherwise it follows the data
        _check_vocabulary(config, mesh)


def _check_vocabulary(config: config_dict.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ``UserError`` unless each shard of ``mesh.tensor`` has its own part of the embedding. With a whole copy, each
    would sum the gradient by itself; GPUs sum what is gathered in no fixed order, and the copies would drift apart."""
    size, shards = config.model.vocab_size, mesh.shape["tensor"]
    if size % shards:
        raise UserError(
            f"mesh.tensor={shards} does not divide model.vocab_size={size}; a larger vocabulary holds the same "
            f"tokens, and the next size that works is {math.ceil(size / shards) * shards}"
        )
