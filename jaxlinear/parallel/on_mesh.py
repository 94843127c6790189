"""Any operation on sharded arrays, from what it publishes of itself (``ops.spec``)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops.backends import Form
from jaxlinear.ops.spec import Arrays, Spec
from jaxlinear.parallel import halos, sharding
from jaxlinear.parallel.exchanges import AXIS
from jaxlinear.parallel.sequence import ShardedTime, time_mesh
from jaxlinear.parallel.sharding import AnyMesh

_OF_SPEC = object()


def on_mesh(spec: Spec) -> Callable[..., Any]:
    """The operation on the mesh in use, for global arrays. ``channels`` names the logical axis of its heads or channels, if
    it is not the one of the spec."""

    @functools.wraps(spec.operation)
    def run(*args: Any, channels: Any = _OF_SPEC, **kwargs: Any) -> Any:
        mesh = sharding.mesh_in_use()
        if mesh is None or mesh.size == 1:
            return spec.operation(*args, **kwargs)
        arrays, options = spec.bind(args, kwargs)
        axis = spec.axis if channels is _OF_SPEC else channels
        if sharding.choices_in_use().gradient_dtype != "float32":
            arrays |= {name: arrays[name].astype(arrays["x"].dtype) for name in spec.parameters}
        if spec.takes_shards:
            options["shards"] = sharding.shards(axis)
        sharded = time_mesh(spec.name, _length(arrays)) is not None
        form = _choose(spec, mesh, axis, arrays, options, sharded)
        given, arrays = arrays, spec.complete(arrays, form)
        axes = _axes(spec, arrays, axis)
        if sharded and spec.over_time == "recurrence":
            options["time"] = ShardedTime(mesh, axis, sharding.choices_in_use().exchange)
        elif sharded and spec.over_time == "halo":
            return _with_halo(spec, mesh, arrays, options, axes)
        elif form.is_kernel:
            return _on_each_device(spec, mesh, arrays, options, axes, form)
        if spec.over_time == "parts":
            options["call"] = lambda part: functools.partial(on_mesh(part), channels=_of_part(part, axis))
        # What ``complete`` made is placed like what was given.
        made = {name: sharding.constrain(x, *axes[name]) for name, x in arrays.items() if x is not given.get(name)}
        if "backend" in spec.options:
            options["backend"] = form
        return spec.operation(**options | arrays | made)

    return run


def _choose(spec: Spec, mesh: AnyMesh, axis: str | None, arrays: Arrays, options: dict, sharded: bool) -> Form:
    """The form for what each device has of the arrays."""
    axes = _axes(spec, arrays, axis)
    own = {
        name: jax.ShapeDtypeStruct(sharding.shard_shape(axes[name], x.shape, mesh), x.dtype)
        for name, x in arrays.items()
    }
    return spec.choose(**options | own, sharded=sharded)


def _axes(spec: Spec, arrays: Arrays, axis: str | None) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of the arrays, one for each axis."""
    leading = spec.axes(arrays, axis)
    return {name: (*leading[name], *(None,) * x.ndim)[: x.ndim] for name, x in arrays.items()}


def _length(arrays: Arrays) -> int:
    return arrays["x" if "x" in arrays else "q"].shape[1]


def _of_part(part: Spec, axis: str | None) -> Any:
    """The logical axis of an operation that another one calls."""
    return axis if part.axis is None else _OF_SPEC


def _on_each_device(spec: Spec, mesh: AnyMesh, arrays: Arrays, options: dict, axes: dict, form: Form) -> Any:
    names, where = tuple(arrays), tuple(axes[name] for name in arrays)
    options = options | {"backend": form}
    options.pop("shards", None)

    def local(*own):
        return spec.operation(**options | dict(zip(names, own, strict=True)))

    like = tuple(names.index(name) for name in spec.results)
    return sharding.on_shards(mesh, local, like if len(like) > 1 else like[0], tuple(arrays.values()), where)


def _with_halo(spec: Spec, mesh: AnyMesh, arrays: Arrays, options: dict, axes: dict) -> Any:
    """A convolution, each shard of time with the inputs that precede it."""
    x, width = arrays["x"], arrays["kernel"].shape[0]
    if width == 1:  # no token sees another one
        return spec.operation(**options | arrays)
    none = jnp.zeros_like(x, shape=(x.shape[0], width - 1, x.shape[2]))
    state_axes = axes["x"][0], None, axes["x"][2]
    arrays, axes = {"state": none} | arrays, {"state": state_axes} | axes
    names = tuple(arrays)

    def local(*own):
        given = dict(zip(names, own, strict=True))
        past = halos.before(given["x"], width - 1, given.pop("state"))
        given["x"] = jnp.concatenate([past, given["x"]], axis=1)
        if "segment_ids" in given:
            ids = given["segment_ids"]
            given["segment_ids"] = jnp.concatenate([halos.ids_before(ids, width - 1), ids], axis=1)
        y, final = spec.operation(**options | given)
        return y[:, width - 1 :], _from_last_shard(final)

    like = tuple(names.index(name) for name in spec.results)
    return sharding.on_shards(mesh, local, like, tuple(arrays.values()), tuple(axes[name] for name in names))


def _from_last_shard(x: jax.Array) -> jax.Array:
    """The last shard's value on every shard."""
    is_last = lax.axis_index(AXIS) == lax.axis_size(AXIS) - 1
    return lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), AXIS)
