"""The weights that a run begins with if they are not new: those of another run, or imported ones."""

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

_PARAMETRISATION = "norm_offset"  # with another the weights are of no use: norms would double, or be near 0
_OF_THE_RUN_ALONE = ("remat", "kernels", "dtype")  # keys of a model that do not change what its weights mean


@dataclasses.dataclass(frozen=True)
class Initial:
    """The parameters of the checkpoint of ``step`` in ``workdir``, which fit a run; the rest of its state starts anew."""

    workdir: Path
    step: int
    said: tuple[str, ...]  # what the user should know when they are used

    @classmethod
    def find(cls, job: Job) -> "Initial":
        """The parameters that ``training.initial_from`` of the run names.

        Raises:
          UserError: there is no such checkpoint, its model has other parameters, or its text other tokens.
        """
        path = Path(job.config.training.initial_from)
        workdir, step = path, None
        if path.parent.name == DIRECTORY and path.name.isdigit():
            workdir, step = path.parents[1], int(path.name)
        step = _step(workdir, step)
        said = [f"but {difference}" for difference in _differences(workdir, job)]
        if job.texts and not (workdir / INFO_FILE).is_file():
            said.append(
                f"which names no tokenizer: make sure that {', '.join(job.texts)} was prepared with its tokenizer"
            )
        for dataset in job.texts:
            trained_data.check_tokenizer(workdir, dataset, data.read_manifest(dataset))
        if job.datasets:
            manifest = data.read_manifest(job.heldout_path)
            said += [f"but {other}" for other in trained_data.other_splits(workdir, job.heldout_path, manifest)]
        return cls(workdir, step, tuple(said))

    def __str__(self) -> str:
        return str(self.workdir / DIRECTORY / str(self.step))

    def put_into(self, state: states.TrainState, structs: states.TrainState) -> states.TrainState:
        """The state with these parameters; its own are deleted before these are read. ``structs``: their shapes and
        placements on the mesh."""
        _LOG.info("starting from the weights of %s", self)
        for what in self.said:
            _LOG.warning("the run starts from the weights of %s, %s", self.workdir, what)
        for leaf in jax.tree.leaves(state.parameters):
            leaf.delete()
        read = Checkpoints(self.workdir).restore({"parameters": structs.parameters}, self.step)
        return dataclasses.replace(state, parameters=read["parameters"])


def _differences(workdir: Path, job: Job) -> list[str]:
    """The differences between the two models if they have the same parameters; else ``UserError`` with all of them."""
    there, here = workdirs.read_config(workdir), job.config
    shapes = parameters.describe(configs.model_config(there)).shapes
    differences = [
        f"{key} is {there.model[name]!r} there and {here.model[name]!r} in this config"
        for key, name in ((key, key.removeprefix("model.")) for key in configs.KEYS if key.startswith("model."))
        if name not in _OF_THE_RUN_ALONE and there.model[name] != here.model[name]
    ]
    if there.model[_PARAMETRISATION] != here.model[_PARAMETRISATION]:
        raise UserError(
            f"training.initial_from={here.training.initial_from} has weights for another form of RMSNorm: "
            f"{'; '.join(differences)}; set model.{_PARAMETRISATION}={there.model[_PARAMETRISATION]:g}"
        )
    theirs, ours = _by_path(shapes), _by_path(job.architecture.shapes)
    if theirs != ours:
        path = next(path for path in [*ours, *theirs] if theirs.get(path) != ours.get(path))
        of_array = f"the shape of {path} is {theirs.get(path)} there and {ours.get(path)} here"
        raise UserError(
            f"training.initial_from={here.training.initial_from} has the weights of another model: "
            f"{'; '.join([*differences, of_array])}"
        )
    return differences


def _step(workdir: Path, step: int | None) -> int:
    steps = Checkpoints(workdir).steps()
    if not steps:
        raise UserError(f"training.initial_from={workdir} has no completed checkpoint")
    if step is not None and step not in steps:
        raise UserError(
            f"training.initial_from: {workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    return steps[-1] if step is None else step


def _by_path(tree: dict) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
