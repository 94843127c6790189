"""The training step ahead of its run: traced from shapes alone, for devices that need not be there."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import stages
from jax.sharding import Mesh
from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear.errors import UserError
from jaxlinear.models import parameters
from jaxlinear.parallel import compiler
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import state as states
from jaxlinear.training.job import check_mesh
from jaxlinear.training.optimizer import make_optimizer
from jaxlinear.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The step that ``training.loop.train`` runs, traced and not compiled yet."""

    config: config_dict.ConfigDict
    architecture: parameters.Architecture
    mesh: Mesh
    state: states.TrainState  # shapes, with their places
    traced: stages.Traced

    def compile(self) -> stages.Compiled:
        """Compiled for devices that are not there."""
        platform = self.mesh.devices.flat[0].platform
        return self.traced.lower().compile(compiler_options=compiler.WITHOUT_DEVICE.get(platform))


def trace(config: config_dict.ConfigDict, devices: Sequence[jax.Device]) -> Ahead:
    """The training step of a config on these devices. No data is read, so ``model.vocab_size`` must be given."""
    config = configs.resolve(config)
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size is not set, and there is no tokeniser to take it from")
    mesh = meshes.make_mesh(config.mesh, devices)
    check_mesh(config, mesh)
    architecture = parameters.describe(configs.model_config(config))
    optimizer = make_optimizer(config, architecture)
    shape = config.training.batch_size, config.training.sequence_length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=meshes.batch_sharding(mesh))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    state = states.structs(architecture, optimizer, mesh)
    traced = make_train_step(config, architecture, optimizer, mesh).trace(state, batch)
    return Ahead(config, architecture, mesh, state, traced)
