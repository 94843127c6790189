"""Sequence parallelism: any family of recurrence over the mesh axis ``sequence``, by one exchange of fixed-size states.

Each shard of time summarises itself as the map (M_r, C_r) of its run; the maps are exchanged; each shard folds those
before it over the initial state and computes its outputs from the result. In the backward pass, with D_r the gradient
of shard r's outputs with respect to the state before it, the D are exchanged and folded the other way, G_r = D_{r+1} +
M_{r+1}^T G_{r+1}; a shard's own gradients follow from those of its outputs and G_r. What is exchanged does not grow
with T (LASP-2, Sun et al. 2025, arXiv:2502.07563, for linear attention without decay; here for every family).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxlinear.costs import traced
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, dtypes, protocol, segments
from jaxlinear.ops.protocol import Family, State
from jaxlinear.parallel import cost, exchanges, halos, sharding
from jaxlinear.parallel.exchanges import AXIS
from jaxlinear.parallel.sharding import AnyMesh


@dataclasses.dataclass(frozen=True)
class ShardedTime:
    """Time sharded over the axis ``sequence`` of a mesh (``protocol.TimeAxis``).

    ``heads`` is the logical axis of the third axis of the inputs, which is the second of a state and the first of
    constants; what all heads share has size 1 there, and is whole on each device. ``exchange`` names one of
    ``exchanges.EXCHANGES``, or is ``"auto"``: ``parallel.cost`` chooses.
    """

    mesh: AnyMesh
    heads: str | None
    exchange: str

    def starts(self, segment_ids: jax.Array) -> jax.Array:
        spec = self._spec(segment_ids, "batch", "time")

        def local(ids):
            return segments.starts(jnp.concatenate([halos.ids_before(ids, 1), ids], axis=1))[:, 1:]

        return _shard_map(local, self.mesh, (spec,), spec)(segment_ids)

    def run(
        self, family: Family, chunk: int | None, inputs: Any, constants: Any, state: State
    ) -> tuple[jax.Array, State]:
        """``ops.protocol.chunked`` of global arrays. The outputs are sharded as the inputs are; the last state is on
        every shard."""
        chunk = chunk or jax.tree.leaves(inputs)[0].shape[1] // self.mesh.shape[AXIS]
        of_inputs = jax.tree.map(lambda x: self._spec(x, "batch", "time", self.heads), inputs)
        of_constants = jax.tree.map(lambda x: self._spec(x, self.heads), constants)
        of_state = self._spec(state, "batch", self.heads)
        whole = functools.partial(protocol.chunked, family, chunk)
        outputs, _ = jax.eval_shape(whole, inputs, constants, state)
        own = jax.eval_shape(
            lambda *shard: _summarised(family, chunk, *shard)[2],
            self._shards(inputs, of_inputs),
            self._shards(constants, of_constants),
        )
        packed = jax.eval_shape(family.pack, own[0])
        of_outputs = self._spec(outputs, "batch", "time", self.heads)
        # Kept between the passes, under any remat policy: the state before each shard, and what an exchange keeps of M
        # ([W, B, ...]). So nothing grows with T, and nothing is exchanged twice. States before chunks follow from these.
        of_start = PartitionSpec(AXIS, *of_state)
        of_transitions = PartitionSpec(AXIS, *of_state[: packed.ndim])
        exchange = cost.choose_exchange(self.exchange, _load(family, packed, own, self.mesh), *kind_and_span(self.mesh))
        forward, backward = _local(family, chunk, exchange, of_inputs, of_constants)

        @jax.custom_vjp
        def sharded(inputs, constants, state):
            return sharded_forward(inputs, constants, state)[0]

        def sharded_forward(inputs, constants, state):
            results = of_outputs, of_state, of_start, of_transitions
            mapped = _shard_map(forward, self.mesh, (of_inputs, of_constants, of_state), results)
            outputs, final, start, transitions = mapped(inputs, constants, state)
            return (protocol.named(outputs), final), (inputs, constants, start, transitions)

        def sharded_backward(residuals, cotangents):
            of_gradients = jax.tree.map(_if_floating, residuals[0], of_inputs)
            arguments = of_inputs, of_constants, of_start, of_transitions, of_outputs, of_state
            mapped = _shard_map(backward, self.mesh, arguments, (of_gradients, of_constants, of_state))
            return mapped(*residuals, *cotangents)

        sharded.defvjp(sharded_forward, sharded_backward)
        return sharded(inputs, constants, state)

    def _shards(self, tree: Any, specs: Any) -> Any:
        """The shapes of each device's parts."""

        def one(x, spec):
            return jax.ShapeDtypeStruct(sharding.part_of(x.shape, spec, self.mesh), x.dtype)

        return jax.tree.map(one, tree, specs)

    def _spec(self, x: jax.Array, *axes: str | None) -> PartitionSpec:
        """The partition of x, whose first axes these are."""
        return sharding.spec((*axes, *(None,) * x.ndim)[: x.ndim], x.shape, self.mesh)


def time_mesh(operation: str, length: int) -> AnyMesh | None:
    """The mesh in use if it shards this many tokens over its axis ``sequence``."""
    mesh = sharding.mesh_in_use()
    if mesh is None or mesh.shape.get(AXIS, 1) == 1 or length == 1:
        return None
    if length % mesh.shape[AXIS]:
        raise UserError(
            f"{operation}: mesh.sequence={mesh.shape[AXIS]} does not divide {length} tokens; the next length that "
            f"works is {-(-length // mesh.shape[AXIS]) * mesh.shape[AXIS]}"
        )
    return mesh


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """``ops.segments.starts``: ``[B, T]`` bool, where a document begins inside the row."""
    mesh = time_mesh("document_starts", segment_ids.shape[1])
    return segments.starts(segment_ids) if mesh is None else ShardedTime(mesh, None, "auto").starts(segment_ids)


def kind_and_span(mesh: AnyMesh) -> tuple[str, int]:
    """The kind of the mesh's devices, and how many neighbouring devices a row of shards spans (``parallel.cost``)."""
    return backends.target().kind, math.prod(mesh.axis_sizes[mesh.axis_names.index(AXIS) :])


def _load(family, packed, own, mesh) -> cost.States:
    flops = [
        traced.products_of(function, own, x).flops for function, x in ((family.advance, own[1]), (family.compose, own))
    ]
    return cost.States(mesh.shape[AXIS], cost.size_of(packed), cost.size_of(own[1]), *flops)


def _summarised(family, chunk, inputs, constants):
    """For one shard: the run by chunks, their maps, and the map of the whole run."""
    run = family.prepare(protocol.split(inputs, chunk), constants)
    summaries = protocol.by_chunk(family.summarise(run), jax.tree.leaves(inputs)[0].shape[0])
    return run, summaries, protocol.whole(family, summaries)


def _local(family, chunk, exchange, of_inputs, of_constants):
    """The two passes on one shard."""
    forward_exchange, backward_exchange = exchanges.EXCHANGES[exchange]
    axes_in_use = {name for spec in jax.tree.leaves(of_inputs, is_leaf=_is_spec) for name in sharding.mesh_axes(spec)}

    def forward(inputs, constants, state):
        batch, length = jax.tree.leaves(inputs)[0].shape[:2]
        run, summaries, own = _summarised(family, chunk, inputs, constants)
        exchanged = forward_exchange(exchanges.Maps(family, constants, length), own, state)
        start, final, transitions = protocol.named(exchanged, exchanges.EXCHANGED)
        before, _ = protocol.fold(family, summaries, start)
        outputs = protocol.join(family.apply(run, protocol.flat(before)), batch, length)
        return outputs, final, jax.tree.map(lambda x: x[None], start), transitions

    def backward(inputs, constants, start, transitions, d_outputs, d_final):
        _, summaries, _ = _summarised(family, chunk, inputs, constants)
        before, _ = protocol.fold(family, summaries, jax.tree.map(lambda x: x[0], start))
        gradients = protocol.Gradients(family, chunk, inputs, constants, before, d_outputs)
        d_shard = gradients.first_state_gradient()
        maps = exchanges.Maps(family, constants, d_outputs.shape[1])
        d_after, d_state = backward_exchange(maps, transitions, d_shard, d_final)
        after, _ = gradients.fold_back(d_after)
        d_inputs, d_constants = gradients.of_inputs(after)

        def summed(x, spec):
            """The gradient of what is whole on several devices, summed: each has the share of its part of the rest."""
            axes = () if x is None else tuple(sorted(axes_in_use - sharding.mesh_axes(spec)))
            return lax.psum(x.astype(dtypes.wide(x.dtype)), axes).astype(x.dtype) if axes else x

        d_inputs = jax.tree.map(summed, d_inputs, of_inputs, is_leaf=lambda x: x is None)
        return d_inputs, jax.tree.map(summed, d_constants, of_constants), d_state

    return forward, backward


def _shard_map(function, mesh, in_specs, out_specs):
    # Values that are equal on several devices are computed alike on each, so nothing needs checking or summing here.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _if_floating(x: jax.Array, spec: PartitionSpec) -> PartitionSpec | None:
    return spec if jnp.issubdtype(x.dtype, jnp.inexact) else None


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
