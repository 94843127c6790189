"""Logical axes of parameters and activations, and the rules that map them to mesh axes."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlinear.ops import backends

# Every logical axis and the mesh axes that it is spread over. Axes that are not named here are replicated.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "time": ("sequence",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "recurrent": ("tensor",),
    "heads": ("tensor",),
    "expert": ("expert",),
    # The rows of a batch over the copies of the parameters alone, and the axes of "batch" that this leaves.
    "rows": ("data",),
    "columns": ("fsdp", "expert"),
}


class Choices(NamedTuple):
    """How devices exchange data: the config keys of ``parallel``."""

    exchange: str = "auto"
    attention: str = "auto"
    gradient_dtype: str = "float32"


AnyMesh: TypeAlias = Mesh | AbstractMesh
TIME = ("batch", "time")
_COPIES = "data"  # the mesh axis along which devices have copies of the parameters

_in_use: list[tuple[AnyMesh, Choices]] = []


@contextlib.contextmanager
def use_mesh(mesh: Mesh, **choices: str) -> Iterator[None]:
    """Within the context, ``constrain`` places activations on ``mesh``, and operations are traced for its devices and
    exchange data by the ``Choices``. Outside any, ``constrain`` does nothing."""
    _in_use.append((mesh, Choices(**choices)))
    try:
        with backends.use_device(mesh.devices.flat[0]):
            yield
    finally:
        _in_use.pop()


def summed_over_copies(function: Callable[..., Any], parameters: Any, batch: Any) -> Any:
    """``function(parameters, batch)``, a tree of sums over the rows of the batch: the devices of each copy of the
    parameters compute it from their own rows, and the results are then summed, once. The compiler would sum each part
    as it comes, and does so with ``mesh.tensor``. The function is traced for the rows of one copy, and what it computes
    has to be a sum over them; whatever else it needs of the others' rows, ``summed_over_all_copies`` provides."""
    mesh, choices = _in_use[-1]
    # Tracing for one copy, XLA in JAX 0.11 ends the process where rows are looked up in a split vocabulary.
    if mesh.shape.get(_COPIES, 1) == 1 or parts("vocab") > 1:
        return function(parameters, batch)

    def of_one_copy(parameters, batch):
        _in_use.append((jax.sharding.get_abstract_mesh(), choices))
        try:
            own = function(parameters, batch)
        finally:
            _in_use.pop()
        return jax.tree.map(lambda x: lax.psum(x, _COPIES), own)

    in_specs = PartitionSpec(), PartitionSpec(_COPIES)
    mapped = jax.shard_map(
        of_one_copy, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), axis_names={_COPIES}, check_vma=False
    )
    return mapped(parameters, batch)


def summed_over_all_copies(x: jax.Array) -> jax.Array:
    """A sum over the rows of all copies, from the sum over those of one; for values that have no gradient."""
    mesh = mesh_in_use()
    apart = mesh is not None and _COPIES in mesh.shape and _COPIES not in _sizes(mesh)
    return lax.psum(lax.stop_gradient(x), _COPIES) if apart else x


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """The partition of an array with these logical axes. An axis that its mesh axes do not divide is replicated."""
    sizes = _sizes(mesh)
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.get(axis or "", ()) if sizes.get(name, 1) > 1)
        parts = math.prod(sizes[name] for name in names)
        entries.append(names if names and size % parts == 0 else None)
    return PartitionSpec(*entries)


def _sizes(mesh: AnyMesh) -> dict[str, int]:
    """The sizes of the mesh axes that arrays can be spread over here: the program covers one part of any other axis."""
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}


def mesh_axes(entries: Iterable[Any]) -> set[str]:
    """The mesh axes that appear in a ``PartitionSpec``, or in some of its entries."""
    return {name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)}


def shard_shape(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh) -> tuple[int, ...]:
    """The shape of each device's part of an array with these logical axes."""
    return part_of(shape, spec(axes, shape, mesh), mesh)


def part_of(shape: tuple[int, ...], where: PartitionSpec, mesh: AnyMesh) -> tuple[int, ...]:
    """The shape of each device's part of an array with this partition; ``NamedSharding`` has none for copies of
    parameters."""
    entries = ((name,) if isinstance(name, str) else name or () for name in where)
    parts = (math.prod(mesh.shape[name] for name in names) for names in entries)
    return tuple(size // count for size, count in itertools.zip_longest(shape, parts, fillvalue=1))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Places an activation by its logical axes on the mesh in use."""
    mesh = mesh_in_use()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh)))


def gather_embed(x: jax.Array, axes: tuple[str | None, ...], dtype: jnp.dtype) -> jax.Array:
    """A parameter sharded by these logical axes, with the axis ``embed`` whole on each device, in ``dtype``. It is
    gathered here, once, where XLA would rather move tokens, or gather it in each trip of a loop. It has no gradient,
    which would be of ``dtype``."""
    # Cast before the gather: otherwise it is gathered first, as twice the bytes, and all of it cast.
    x = constrain(jax.lax.stop_gradient(x).astype(dtype), *axes)
    return constrain(x, *(None if axis == "embed" else axis for axis in axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def place_gradient(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """x, with its gradient sharded by these logical axes."""
    return x


place_gradient.defvjp(lambda x, axes: (x, None), lambda axes, _, d_x: (constrain(d_x, *axes),))


def mesh_in_use() -> AnyMesh | None:
    """The mesh of the innermost ``use_mesh``; None outside any."""
    return _in_use[-1][0] if _in_use else None


def choices_in_use() -> Choices:
    """The choices of the innermost ``use_mesh``; outside any, the defaults."""
    return _in_use[-1][1] if _in_use else Choices()


def on_shards(mesh: AnyMesh, function: Callable[..., Any], like: Any, arguments: tuple, axes: tuple) -> Any:
    """``function`` on each device's parts of the arguments, which are sharded by their logical axes (None is passed on).

    ``like``: for each output, the number of the argument whose sharding it has.
    """
    specs = tuple(None if x is None else spec(names, x.shape, mesh) for names, x in zip(axes, arguments, strict=True))
    out_specs = jax.tree.map(lambda i: specs[i], like)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*arguments)


def token_by_token(function: Callable[..., Any], *tokens: jax.Array) -> Any:
    """``function(*tokens)``, from arrays ``[B, T, ...]`` to such arrays, with each device computing only its own
    tokens: for operations that XLA would rather gather than split, such as ``top_k``."""
    mesh = mesh_in_use()
    if mesh is None or mesh.size == 1:
        return function(*tokens)
    rows = spec(TIME, tokens[0].shape[:2], mesh)
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)(*tokens)


def parts(axis: str) -> int:
    """The number of devices over which a logical axis is spread on the mesh in use."""
    mesh = mesh_in_use()
    return 1 if mesh is None else parts_on(_sizes(mesh), axis)


def parts_on(sizes: Mapping[str, int], *axes: str) -> int:
    """The number of devices over which logical axes are spread on a mesh of these sizes."""
    return math.prod(sizes.get(name, 1) for axis in axes for name in RULES[axis])


def shards(axis: str | None) -> tuple[int, int]:
    """Into how many parts the mesh in use divides time and another logical axis."""
    return parts("time"), 1 if axis is None else parts(axis)


def batch_groups() -> int:
    """The number of devices over which the batch is spread on the mesh in use."""
    return parts("batch")
