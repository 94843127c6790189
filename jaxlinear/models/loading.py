"""From a run's directory to a model with its weights."""

import os

import jax

from jaxlinear.models.language_model import LanguageModel


def load(
    workdir: str | os.PathLike, step: int | None = None, *, mesh: jax.sharding.Mesh | None = None
) -> LanguageModel:
    """The model of a trained run, with the weights of the newest checkpoint or of ``step``.

    On ``mesh``, the parameters are placed by the sharding rules; without one, on the first device. ``UserError`` names what
    is missing or cannot be read.
    """
    # Imported here, since they import this package: configs contain a model's, and runs have a config.
    from jaxlinear import config as configs
    from jaxlinear.checkpoint import Checkpoints
    from jaxlinear.models import parameters
    from jaxlinear.parallel import mesh as meshes
    from jaxlinear.training.workdir import read_config

    config = read_config(workdir)
    architecture = parameters.describe(configs.model_config(config))
    if mesh is None:
        mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, "expert": 1}, jax.devices()[:1])
    structs = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        architecture.shapes,
        architecture.shardings(mesh),
    )
    restored = Checkpoints(workdir).restore({"parameters": structs}, step)
    return architecture.bind(restored["parameters"])
