"""The weights that a run begins with where they are not new: those of another run, or imported ones."""

import dataclasses
import logging
from pathlib import Path

import jax

from jaxlinear import config as configs
from jaxlinear import data
from jaxlinear.checkpoint import DIRECTORY, Checkpoints
from jaxlinear.data.tokenizer import INFO_FILE
from jaxlinear.errors import UserError
from jaxlinear.models import parameters
from jaxlinear.training import state as states
from jaxlinear.training import trained_data
from jaxlinear.training import workdir as workdirs
from jaxlinear.training.job import Job

_LOG = logging.getLogger(__name__)

_OF_THE_RUN_ALONE = ("remat", "dtype")  # keys of a model that say nothing of what its weights mean


@dataclasses.dataclass(frozen=True)
class Initial:
    """The parameters of the checkpoint of ``step`` in ``workdir``, which fit a run; the rest of its state begins anew."""

    workdir: Path
    step: int

    @classmethod
    def find(cls, job: Job) -> "Initial":
        """What ``training.initial_from`` of the run names.

        Raises:
          UserError: there is no such checkpoint, its model has other parameters, or its text other tokens.
        """
        path = Path(job.config.training.initial_from)
        workdir, step = path, None
        if path.parent.name == DIRECTORY and path.name.isdigit():
            workdir, step = path.parents[1], int(path.name)
        found = cls(workdir, _step(workdir, step))
        found._check_model(job)
        if job.datasets and not (workdir / INFO_FILE).is_file():
            _LOG.warning("%s names no tokenizer: see to it that %s has its own", workdir, ", ".join(job.datasets))
        for dataset in job.datasets:
            trained_data.check_tokenizer(workdir, dataset, data.read_manifest(dataset))
        return found

    def __str__(self) -> str:
        return str(self.workdir / DIRECTORY / str(self.step))

    def _check_model(self, job: Job) -> None:
        there, here = workdirs.read_config(self.workdir), job.config
        shapes = parameters.describe(configs.model_config(there)).shapes
        fits = _by_path(shapes) == _by_path(job.architecture.shapes)
        for key in configs.KEYS:
            section, name = key.split(".")
            if section != "model" or name in _OF_THE_RUN_ALONE or there.model[name] == here.model[name]:
                continue
            difference = f"{key} is {there.model[name]!r} there and {here.model[name]!r} in this config"
            if not fits:
                raise UserError(
                    f"training.initial_from={here.training.initial_from} has the weights of another model: {difference}"
                )
            _LOG.warning("the run begins with the weights of %s, but %s", self.workdir, difference)
        assert fits, "models of one config have the same parameters"

    def put_into(self, state: states.TrainState, structs: states.TrainState) -> states.TrainState:
        """The state with these parameters; its own are let go of before they are read. ``structs``: their shapes and their
        places on the mesh."""
        _LOG.info("beginning with the weights of %s", self)
        state = dataclasses.replace(state, parameters={})
        read = Checkpoints(self.workdir).restore({"parameters": structs.parameters}, self.step)
        return dataclasses.replace(state, parameters=read["parameters"])


def _step(workdir: Path, step: int | None) -> int:
    steps = Checkpoints(workdir).steps()
    if not steps:
        raise UserError(f"training.initial_from={workdir} holds no checkpoint that was completed")
    if step is not None and step not in steps:
        raise UserError(
            f"training.initial_from: {workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    return steps[-1] if step is None else step


def _by_path(tree: dict) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
