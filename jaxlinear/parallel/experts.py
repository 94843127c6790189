"""Experts spread over devices: tokens travel to them, and the sums of their contributions travel back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxlinear.parallel import sharding

Axes = tuple[str | None, ...]
Compute = Callable[[Any, dict[str, jax.Array], jax.Array], jax.Array]

_SPLIT = ("expert", "mlp")  # logical axes of parameters that are split while a device computes; others are gathered


def over_experts(
    compute: Compute, tokens: Any, parameters: Mapping[str, jax.Array], axes: Mapping[str, Axes]
) -> jax.Array:
    """``compute(tokens, parameters, 0)``, with each device of the mesh in use computing only its own experts.

    Experts are split over the mesh axis ``expert``, and so are the rows of the batch. Devices that differ only in that
    axis gather their tokens, each computes what its experts contribute to all of them, and the contributions are summed
    where the tokens came from. Shapes are fixed and no token can be dropped: a device has room for the case that every
    token chooses its experts.

    Args:
      compute: ``(tokens, parameters of some experts, number of the first) -> [B, T, D]``, their contribution to a sum over
        experts and, if axes named "mlp" are split, over these channels.
      tokens: a tree of ``[B, T, ...]``.
      parameters: by name.
      axes: the logical axes of each parameter.
    """
    mesh = sharding.mesh_in_use()
    if mesh is None or mesh.size == 1:
        return compute(tokens, dict(parameters), jnp.int32(0))

    rows = sharding.spec(("batch", "time"), jax.tree.leaves(tokens)[0].shape[:2], mesh)
    spread = sharding.mesh_axes(rows)
    specs: dict[str, PartitionSpec] = {}
    summed: set[str] = set()
    for name, value in parameters.items():
        entries = list(zip(axes[name], sharding.spec(axes[name], value.shape, mesh), strict=True))
        summed |= sharding.mesh_axes(entry for axis, entry in entries if axis in _SPLIT)
        # Over mesh axes that do not split the rows it is gathered beforehand: devices along them do the same work.
        kept = (entry if axis in _SPLIT or sharding.mesh_axes([entry]) <= spread else None for axis, entry in entries)
        specs[name] = PartitionSpec(*kept)
    exchanged, added = tuple(sorted(summed & spread)), tuple(sorted(summed - spread))

    def on_one_device(tokens, parameters):
        for name, spec in specs.items():
            gathered = _gather(parameters[name], axes[name], spec)
            parameters[name] = _vary(gathered, sharding.mesh_axes(spec), spread | summed)
        if exchanged:
            tokens = jax.tree.map(lambda x: lax.all_gather(x, exchanged, axis=0, tiled=True), tokens)
        tokens = jax.tree.map(lambda x: _vary(x, spread, spread | summed), tokens)
        y = compute(tokens, parameters, _first_expert(parameters, axes, specs))
        if exchanged:
            y = lax.psum_scatter(y, exchanged, scatter_dimension=0, tiled=True)
        return lax.psum(y, added) if added else y

    return jax.shard_map(on_one_device, mesh=mesh, in_specs=(rows, specs), out_specs=rows)(tokens, dict(parameters))


def _gather(x: jax.Array, axes: Axes, spec: PartitionSpec) -> jax.Array:
    """A parameter, whole except for the axes that stay split. Its gradient is summed and scattered in the same way."""
    for dimension, (axis, entry) in enumerate(zip(axes, spec, strict=True)):
        if entry and axis not in _SPLIT:
            x = lax.all_gather(x, entry, axis=dimension, tiled=True)
    return x


def _vary(x: jax.Array, varies: set[str], over: set[str]) -> jax.Array:
    """Marks a value that is equal on the devices along some mesh axes as varying: its gradient is summed over them."""
    return lax.pcast(x, tuple(sorted(over - varies)), to="varying")


def _first_expert(parameters: dict[str, jax.Array], axes: Mapping[str, Axes], specs) -> jax.Array:
    for name, value in parameters.items():
        dimension = axes[name].index("expert")
        if specs[name][dimension]:
            return lax.axis_index(specs[name][dimension]).astype(jnp.int32) * value.shape[dimension]
    return jnp.int32(0)
