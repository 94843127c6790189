"""A run for evaluation: its config and one of its checkpoints on the devices, with nothing that can be trained."""

import dataclasses
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import config_dict

from jaxlinear.checkpoint import Checkpoints
from jaxlinear.errors import UserError
from jaxlinear.models import load, mixers, parameters
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training.job import rows_at_once
from jaxlinear.training.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Run:
    """``parameters`` are on ``mesh``, whose devices share each batch, by the sharding rules."""

    workdir: Path
    step: int
    config: config_dict.ConfigDict
    architecture: parameters.Architecture
    parameters: dict[str, Any]
    mesh: jax.sharding.Mesh
    _programs: dict[Hashable, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def at(self, step: int) -> "Run":
        """The same run with the weights of another checkpoint, and the config of today: a run may resume on other data."""
        config = read_config(self.workdir)
        model = load(self.workdir, step, mesh=self.mesh)
        return dataclasses.replace(self, step=step, config=config, parameters=nnx.to_pure_dict(nnx.split(model)[1]))

    def batch_tokens(self, given: int) -> int:
        """Tokens of a batch: ``given`` or, if that is 0, those of a microbatch, for which the run had enough memory."""
        return given or rows_at_once(self.config) * self.config.training.sequence_length

    def program(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of ``make``, cached for all checkpoints: compiled functions that take the parameters."""
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def summary(self) -> dict[str, Any]:
        """What a report says about the run itself."""
        training = self.config.training
        return {
            "workdir": str(self.workdir),
            "step": self.step,
            "parameters": self.architecture.num_parameters,
            "model": dict(self.config.model) | {"pattern": list(self.config.model.pattern)},
            "training": {name: training[name] for name in ("steps", "batch_size", "sequence_length", "seed")},
        }


def open_run(workdir: str | os.PathLike, step: int | None = None, mesh: Sequence[str] = ()) -> Run:
    """The run with the weights of its newest checkpoint or of ``step``, on all devices. ``mesh`` is passed to
    ``mesh.from_text``; it need not be the mesh that the run was trained on."""
    config = read_config(workdir)
    devices = meshes.from_text(mesh)
    mixers.check_over_sequence(config.model.pattern[: config.model.num_layers], devices.shape["sequence"])
    if step is None:  # fixed here, since a run in progress may save another one at any time
        steps = Checkpoints(workdir).steps()
        if not steps:
            raise UserError(f"{workdir} has no completed checkpoint")
        step = steps[-1]
    model = load(workdir, step, mesh=devices)
    return Run(
        workdir=Path(workdir),
        step=step,
        config=config,
        architecture=parameters.describe(model.config),
        parameters=nnx.to_pure_dict(nnx.split(model)[1]),
        mesh=devices,
    )
