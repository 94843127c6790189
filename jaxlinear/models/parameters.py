"""A model as a pure function: its structure, and its parameters as a nested dict of arrays."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.language_model import LanguageModel
from jaxlinear.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a ``ModelConfig`` fixes before any number is drawn. ``shapes`` and ``axes`` have the structure of the
    parameters: each leaf's ``ShapeDtypeStruct`` and its logical axes (None for the axis of layers stacked by the scan)."""

    config: ModelConfig
    graph: nnx.GraphDef
    shapes: dict[str, Any]
    axes: dict[str, Any]

    def initialise(self, key: jax.Array) -> dict[str, Any]:
        """Draws the parameters. A pure function of the key, to be jitted with the intended shardings."""
        return nnx.to_pure_dict(nnx.split(LanguageModel(self.config, rngs=nnx.Rngs(key)))[1])

    def bind(self, parameters: dict[str, Any]) -> LanguageModel:
        """The model with these parameters."""
        return nnx.merge(self.graph, parameters)

    def shardings(self, mesh: Mesh) -> dict[str, Any]:
        """The placement of each parameter on the mesh."""
        return jax.tree.map(
            lambda shape, axes: NamedSharding(mesh, sharding.spec(axes, shape.shape, mesh)),
            self.shapes,
            self.axes,
        )

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model, embeddings included."""
        return sum(shape.size for shape in jax.tree.leaves(self.shapes))

    @property
    def num_embedding_parameters(self) -> int:
        """Number of parameters of the embedding and, if it is separate, of the matrix that gives the logits."""
        return sum(self.shapes[name].size for name in ("embedding", "head") if name in self.shapes)


def describe(config: ModelConfig) -> Architecture:
    """The architecture of ``config``; no array is allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))

    def axes(variable: nnx.Variable) -> tuple[str | None, ...]:
        named = tuple(variable.get_metadata("axes"))
        return (None,) * (len(variable.get_value().shape) - len(named)) + named

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    all_axes = jax.tree.map(lambda variable: variable.replace(_Leaf(axes(variable))), state, is_leaf=is_variable)
    return Architecture(
        config=config,
        graph=graph,
        shapes=nnx.to_pure_dict(state),
        axes=jax.tree.map(lambda leaf: leaf.axes, nnx.to_pure_dict(all_axes), is_leaf=lambda x: isinstance(x, _Leaf)),
    )


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """Keeps a tuple from being taken for a subtree."""

    axes: tuple[str | None, ...]
