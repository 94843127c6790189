"""The state of a training run at a step, and how it is created sharded."""

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
    """Everything that the next step depends on except its batch. Batch number ``step`` is the next to be taken."""

    step: jax.Array  # int32: batches taken, including those of skipped steps
    parameters: dict[str, Any]
    optimizer: Any
    key: jax.Array  # uint32 key data, for layers that would draw while training: no mixer does yet
    norm_average: jax.Array  # float32: running average of the gradient norm over steps that were applied
    skips: jax.Array  # int32: total number of skipped steps
    skips_in_a_row: jax.Array  # int32


def create(architecture: Architecture, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. To be jitted with ``shardings``, so that nothing is created unsharded first."""
    key = jax.random.key(seed & 0xFFFFFFFF)
    if seed >> 32:  # JAX would drop these bits
        key = jax.random.fold_in(key, seed >> 32)
    parameters = architecture.initialise(jax.random.fold_in(key, 0))
    return _before_the_first_step(parameters, jax.random.key_data(jax.random.fold_in(key, 1)), optimizer)


def _before_the_first_step(parameters: Any, key: jax.Array, optimizer: optax.GradientTransformation) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        parameters=parameters,
        optimizer=optimizer.init(parameters),
        key=key,
        norm_average=jnp.zeros((), jnp.float32),
        skips=zero,
        skips_in_a_row=zero,
    )


def shapes(architecture: Architecture, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes of what ``create`` makes, without tracing how a model's parameters are drawn, which takes long."""
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return jax.eval_shape(lambda x, key: _before_the_first_step(x, key, optimizer), architecture.shapes, key)


def shardings(architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The placement of each array of the state: the optimiser's moments like their parameters, scalars everywhere."""
    replicated = NamedSharding(mesh, PartitionSpec())
    parameters = architecture.shardings(mesh)
    by_path = dict(jax.tree_util.tree_leaves_with_path(parameters))
    shape_by_path = dict(jax.tree_util.tree_leaves_with_path(architecture.shapes))

    def place(path, leaf):
        # The optimiser's state has a moment under its parameter's path, with its shape (Adafactor's factors have other
        # shapes: they are small, and replicated).
        for begin in range(len(path)):
            tail = path[begin:]
            if tail in by_path and shape_by_path[tail].shape == leaf.shape:
                return by_path[tail]
        return replicated

    placed = jax.tree_util.tree_map_with_path(place, shapes(architecture, optimizer))
    return dataclasses.replace(placed, parameters=parameters)


def initialise(
    architecture: Architecture, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, created in place on the mesh."""
    placed = shardings(architecture, optimizer, mesh)
    return jax.jit(lambda: create(architecture, optimizer, seed), out_shardings=placed)()


def structs(architecture: Architecture, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes of the state with their placements on the mesh, for compiling the step or restoring without arrays."""
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        shapes(architecture, optimizer),
        shardings(architecture, optimizer, mesh),
    )


def to_trees(state: TrainState) -> dict[str, Any]:
    """The state as the trees of a checkpoint: the parameters are separate, so that a model can be loaded without the
    rest."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "parameters"}
    return {"parameters": state.parameters, "training": rest}


def from_trees(trees: dict[str, Any]) -> TrainState:
    """The inverse of ``to_trees``."""
    return TrainState(parameters=trees["parameters"], **trees["training"])
