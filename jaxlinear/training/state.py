"""What a training run is at a step, and how it is made sharded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlinear.models.parameters import Architecture


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that the next step depends on, besides its batch. Batch number ``step`` is the next to be taken."""

    step: jax.Array  # int32: batches taken, those of skipped steps included
    parameters: dict[str, Any]
    optimizer: Any
    key: jax.Array  # uint32 key data; a layer that draws while training folds the step into it
    norm_average: jax.Array  # float32: running average of the gradient norm over steps that were applied
    skips: jax.Array  # int32: steps skipped in all
    skips_in_a_row: jax.Array  # int32


def create(architecture: Architecture, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. To be jitted with ``shardings``, so that nothing is made whole first."""
    key = jax.random.key(seed & 0xFFFFFFFF)
    if seed >> 32:  # which JAX would leave out
        key = jax.random.fold_in(key, seed >> 32)
    parameters = architecture.initialise(jax.random.fold_in(key, 0))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        parameters=parameters,
        optimizer=optimizer.init(parameters),
        key=jax.random.key_data(jax.random.fold_in(key, 1)),
        norm_average=jnp.zeros((), jnp.float32),
        skips=zero,
        skips_in_a_row=zero,
    )


def shardings(architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each array of the state lies: the optimiser's moments like their parameters, scalars everywhere."""
    shapes = jax.eval_shape(lambda: create(architecture, optimizer, 0))
    replicated = NamedSharding(mesh, PartitionSpec())
    parameters = architecture.shardings(mesh)
    by_path = dict(jax.tree_util.tree_leaves_with_path(parameters))
    shape_by_path = dict(jax.tree_util.tree_leaves_with_path(architecture.shapes))

    def place(path, leaf):
        # A moment stands in the optimiser's state under its parameter's path, and has its shape (Adafactor's factors
        # do not: they are small, and replicated).
        for begin in range(len(path)):
            tail = path[begin:]
            if tail in by_path and shape_by_path[tail].shape == leaf.shape:
                return by_path[tail]
        return replicated

    placed = jax.tree_util.tree_map_with_path(place, shapes)
    return dataclasses.replace(placed, parameters=parameters)


def initialise(
    architecture: Architecture, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, made in its place on the mesh."""
    placed = shardings(architecture, optimizer, mesh)
    return jax.jit(lambda: create(architecture, optimizer, seed), out_shardings=placed)()


def structs(architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes of the state with their places on the mesh: to compile the step, or to restore into, without arrays."""
    shapes = jax.eval_shape(lambda: create(architecture, optimizer, 0))
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        shapes,
        shardings(architecture, optimizer, mesh),
    )


def to_trees(state: TrainState) -> dict[str, Any]:
    """The state as the trees of a checkpoint: the parameters by themselves, so that a model can be loaded without the
    rest."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "parameters"}
    return {"parameters": state.parameters, "training": rest}


def from_trees(trees: dict[str, Any]) -> TrainState:
    """The inverse of ``to_trees``."""
    return TrainState(parameters=trees["parameters"], **trees["training"])
