"""The training step ahead of its run: traced from shapes alone, for devices that need not be present."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import stages
from jax.sharding import Mesh
from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear.models import parameters
from jaxlinear.parallel import compiler
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import state as states
from jaxlinear.training.job import check_mesh, with_vocabulary_of_data
from jaxlinear.training.optimizer import make_optimizer
from jaxlinear.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """The step that ``training.loop.train`` runs, traced but not yet compiled."""

    config: config_dict.ConfigDict
    architecture: parameters.Architecture
    mesh: Mesh
    state: states.TrainState  # shapes, with their placements
    traced: stages.Traced

    def compile(self) -> stages.Compiled:
        """Compiles the step for its devices, which need not be present."""
        platform = self.mesh.devices.flat[0].platform
        return self.traced.lower().compile(compiler_options=compiler.WITHOUT_DEVICE.get(platform))


def trace(config: config_dict.ConfigDict, devices: Sequence[jax.Device]) -> TracedStep:
    """The training step of a config on these devices. Nothing of the data is read except, if ``model.vocab_size`` is not
    set, how many different tokens there are."""
    config = with_vocabulary_of_data(configs.resolve(config))
    mesh = meshes.make_mesh(config.mesh, devices)
    check_mesh(config, mesh)
    architecture = parameters.describe(configs.model_config(config))
    optimizer = make_optimizer(config, architecture)
    shape = config.training.batch_size, config.training.sequence_length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=meshes.batch_sharding(mesh))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    state = states.structs(architecture, optimizer, mesh)
    traced = make_train_step(config, architecture, optimizer, mesh).trace(state, batch)
    return TracedStep(config, architecture, mesh, state, traced)
