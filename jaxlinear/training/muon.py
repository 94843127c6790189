"""Muon (Jordan et al. 2024, github.com/KellerJordan/Muon) as in optax, with the matrices dealt out over the mesh."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from optax import contrib

from jaxlinear.models.parameters import Architecture
from jaxlinear.parallel import sharding

Tree = Any
Names = tuple[str, ...]  # of mesh axes

_BETA = 0.95  # of the momentum


def scale_by_muon(architecture: Architecture, epsilon: float) -> optax.GradientTransformation:
    """``optax.contrib.scale_by_muon`` for parameters whose last two axes are those of a matrix, with the same state.

    It takes five Newton-Schulz steps, fifteen products of a matrix, which cost the same whatever the batch size. For
    matrices that are split over a mesh, XLA computes most products on every device, and gathers and sums for each. Here
    each device is sent some whole matrices, and sends back the results.
    """
    # Without momentum, this is what it does to the momentum.
    numbers = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    orthogonalise = contrib.scale_by_muon(beta=0.0, nesterov=False, eps=epsilon, weight_dimension_numbers=numbers)

    def orthogonal(x: jax.Array) -> jax.Array:
        return orthogonalise.update(x, orthogonalise.init(x))[0]

    axes = dict(jax.tree_util.tree_leaves_with_path(architecture.axes, is_leaf=lambda x: isinstance(x, tuple)))

    def update(updates: Tree, state: contrib.MuonState, parameters: Tree = None) -> tuple[Tree, contrib.MuonState]:
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(updates, state.mu, _BETA, 1)
        ahead = jax.tree.map(
            lambda m, g: _BETA * m + (1 - _BETA) * g,  # Nesterov's
            optax.tree.bias_correction(momentum, _BETA, optax.safe_increment(count)),
            optax.tree.bias_correction(updates, _BETA, count),
        )
        leaves, structure = jax.tree_util.tree_flatten_with_path(ahead)
        turned = _over_devices(orthogonal, [leaf for _, leaf in leaves], [axes[path] for path, _ in leaves])
        return jax.tree_util.tree_unflatten(structure, turned), state._replace(count=count, mu=momentum)

    return optax.GradientTransformation(contrib.scale_by_muon().init, update)


def scale_by_shape() -> optax.GradientTransformation:
    """Multiplies the update of a map from m channels to n by ``sqrt(max(1, n / m))``."""
    return optax.stateless_with_tree_map(lambda x, _: x * math.sqrt(max(1.0, x.shape[-1] / x.shape[-2])))


class _Split(NamedTuple):
    """How a device's part of a stack of matrices ``[N, m, n]``, m <= n, is split: the matrices' shape, the mesh axes over
    which rows and columns are spread, and those over which the stack is."""

    shape: tuple[int, int]
    rows: Names
    columns: Names
    stack: Names


def _over_devices(orthogonal, stacks: Sequence[jax.Array], axes: Sequence[tuple[str | None, ...]]) -> list[jax.Array]:
    """``orthogonal`` of each matrix of stacks ``[..., m, n]``, which are placed on the mesh in use by these logical axes.
    Each matrix is computed on one device."""
    mesh = sharding.mesh_in_use()
    if mesh is None or mesh.size == 1:
        return [orthogonal(x.reshape(-1, *x.shape[-2:])).reshape(x.shape) for x in stacks]
    assert isinstance(mesh, Mesh)  # the optimiser covers all copies together
    specs = [sharding.spec(logical, x.shape, mesh) for logical, x in zip(axes, stacks, strict=True)]
    shapes = [x.shape[-2:] for x in stacks]

    def on_one_device(parts: list[jax.Array]) -> list[jax.Array]:
        # Matrices of one shape are dealt out together, across all layers and parameters, so that the fewest devices have
        # one less than others. A matrix and its transpose have the same update, transposed.
        groups: dict[_Split, list[tuple[int, bool]]] = {}
        for i, (shape, spec) in enumerate(zip(shapes, specs, strict=True)):
            *stack, rows, columns = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
            turn = shape[0] > shape[1] or (shape[0] == shape[1] and columns > rows)
            sides = (columns, rows) if turn else (rows, columns)
            split = _Split((min(shape), max(shape)), *sides, tuple(itertools.chain(*stack)))
            groups.setdefault(split, []).append((i, turn))
        done = list(parts)
        for split, members in groups.items():
            flat = [parts[i].reshape(-1, *parts[i].shape[-2:]) for i, _ in members]
            flat = [x.swapaxes(1, 2) if turn else x for x, (_, turn) in zip(flat, members, strict=True)]
            together = _dealt_out(orthogonal, jnp.concatenate(flat), split, mesh)
            ends = list(itertools.accumulate(len(x) for x in flat))
            for (i, turn), x in zip(members, jnp.split(together, ends[:-1]), strict=True):
                done[i] = (x.swapaxes(1, 2) if turn else x).reshape(parts[i].shape)
        return done

    # Values that are equal along mesh axes come from gathers, which the types do not show.
    spread = jax.shard_map(on_one_device, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)
    return spread(list(stacks))


def _dealt_out(orthogonal, x: jax.Array, split: _Split, mesh: Mesh) -> jax.Array:
    """``orthogonal`` of a stack of which this device holds ``x``, under ``shard_map``."""
    _, rows, columns, stack = split
    copies = tuple(name for name in _fast_axes(mesh) if name not in (*rows, *columns, *stack))
    count, devices = len(x), math.prod(mesh.shape[name] for name in (*rows, *columns, *copies))
    # The barrier hides from XLA for CPUs how the stack is assembled: it would otherwise give an exchange parts in different
    # layouts, which it then refuses (JAX 0.10.2).
    x = lax.optimization_barrier(jnp.pad(x, ((0, -count % devices), (0, 0), (0, 0))))
    for names, axis in ((columns, 2), (rows, 1)):
        if names:
            x = lax.all_to_all(x, names, split_axis=0, concat_axis=axis, tiled=True)
    if copies:
        each = len(x) // math.prod(mesh.shape[name] for name in copies)
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(copies) * each, each)
    x = orthogonal(x)
    if copies:
        x = lax.all_gather(x, copies, axis=0, tiled=True)
    for names, axis in ((rows, 1), (columns, 2)):
        if names:
            x = lax.all_to_all(x, names, split_axis=axis, concat_axis=0, tiled=True)
    return x[:count]


def _fast_axes(mesh: Mesh) -> Names:
    """The axes of more than one device, without ``data`` if it goes from slice to slice over a network: computing the same
    on both sides is cheaper than sending it."""
    slices = {getattr(device, "slice_index", 0) for device in mesh.devices.flat}
    return tuple(name for name, size in mesh.shape.items() if size > 1 and (name != "data" or len(slices) == 1))
