"""Parameters that depend on those of other layers, which a layer does not see under the scan."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.models import mixers
from jaxlinear.models.config import ModelConfig


def across_layers(config: ModelConfig, stacks: Any) -> Any:
    """The stacks of a model, with the functions of its mixers' ``ACROSS_LAYERS`` applied (``mixers/__init__.py``). Each
    stack is one module with stacked parameters, or a list of modules."""
    declared = {mixer: getattr(mixers.find(mixer), "ACROSS_LAYERS", {}) for mixer in config.layers}
    if not any(declared.values()):
        return stacks
    stacks = nnx.clone(stacks)
    # Axis 0 of a stack's parameters is its repetitions; the place in the pattern comes after it.
    parts = []
    for module, stack in zip(stacks, config.stacks, strict=True):
        periods = module if isinstance(module, nnx.List) else [module]
        parts += [(period, stack.pattern, 0 if periods is module else 1) for period in periods]
    for mixer, functions in declared.items():
        for name, function in functions.items():
            groups = []
            for period, pattern, axis in parts:
                blocks = zip(period.blocks, pattern, strict=True)
                variables = [getattr(block.mixer, name) for block, kind in blocks if kind == mixer]
                groups += [(variables, axis)] if variables else []
            _replace(groups, function)
    return stacks


def _replace(groups: list[tuple[list[nnx.Variable], int]], function: Callable[[jax.Array], jax.Array]) -> None:
    """Sets variables to the function of all of them, as rows in the order of the layers. The variables of a group are
    stacked on its axis; that axis and those before it are axes of layers."""
    stacks = [jnp.stack([variable[...] for variable in variables], axis) for variables, axis in groups]
    rows = [stack.reshape(-1, *stack.shape[axis + 1 :]) for stack, (_, axis) in zip(stacks, groups, strict=True)]
    ends = np.cumsum([len(part) for part in rows])
    new = jnp.split(function(jnp.concatenate(rows)), ends[:-1])
    for (variables, axis), stack, part in zip(groups, stacks, new, strict=True):
        for variable, value in zip(variables, jnp.unstack(part.reshape(stack.shape), axis=axis), strict=True):
            variable[...] = value
