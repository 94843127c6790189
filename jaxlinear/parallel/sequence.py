"""Sequence parallelism: any family of recurrence over the mesh axis ``sequence``, by one exchange of fixed-size states.

Each shard of time summarises itself as the map (M_r, C_r) of its run; the maps are exchanged; each shard folds those
before it over the initial state and computes its outputs from what comes of it. Backward, with D_r the gradient of shard
r's outputs with respect to the state before it, the D are exchanged and folded the other way, G_r = D_{r+1} +
M_{r+1}^T G_{r+1}; a shard's own gradients follow from its outputs' and G_r. What is exchanged does not grow with T
(LASP-2, Sun et al. 2025, arXiv:2502.07563, for linear attention without decay; here for every family).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxlinear.ops import recurrence
from jaxlinear.ops.recurrence import Family, State
from jaxlinear.parallel import exchanges, sharding
from jaxlinear.parallel.exchanges import AXIS

Axes = tuple[str | None, ...]


class Layout(NamedTuple):
    """The logical axes of what a family runs on: trees of tuples, as the trees of arrays are."""

    inputs: Any
    constants: Any
    state: Axes
    outputs: Axes


def run(
    mesh: Mesh,
    layout: Layout,
    exchange: str,
    family: Family,
    chunk: int,
    inputs: Any,
    constants: Any,
    state: State,
) -> tuple[jax.Array, State]:
    """``ops.recurrence.chunked`` with time spread over the mesh axis ``sequence``.

    Args:
      mesh: its axis ``sequence`` divides T; the other axes lie as ``layout`` says.
      layout: the logical axes of the arguments.
      exchange: a name in ``exchanges.EXCHANGES``.
      family, chunk, inputs, constants, state: as those of ``chunked``; global arrays.

    Returns:
      the outputs, spread over time as the inputs are, and the state after the last token, on every shard.
    """
    shapes = jax.eval_shape(
        lambda *arguments: (recurrence.chunked(family, chunk, *arguments)[0], _chunks(family, chunk, *arguments)[1][0]),
        *(inputs, constants, state),
    )
    outputs_spec = sharding.spec(layout.outputs, shapes[0].shape, mesh)
    state_spec = sharding.spec(layout.state, state.shape, mesh)
    inputs_specs, constants_specs = (
        jax.tree.map(lambda axes, x: sharding.spec(axes, x.shape, mesh), axes, arrays, is_leaf=_is_axes)
        for axes, arrays in ((layout.inputs, inputs), (layout.constants, constants))
    )
    # Kept between the passes: the state before each chunk [B, N, ...], and what an exchange keeps of M [W, B, ...].
    before_spec = PartitionSpec(state_spec[0], AXIS, *state_spec[1:])
    transition_spec = PartitionSpec(AXIS, *state_spec[: shapes[1].ndim])
    spread = {name for spec in jax.tree.leaves(inputs_specs, is_leaf=_is_spec) for name in _names(spec)}
    forward_exchange, backward_exchange = exchanges.EXCHANGES[exchange]

    def forward(inputs, constants, state):
        batch, length = jax.tree.leaves(inputs)[0].shape[:2]
        run, summaries = _chunks(family, chunk, inputs, constants)
        summaries = recurrence.by_chunk(summaries, batch)
        start, final, transitions = forward_exchange(family, recurrence.whole(family, summaries), state)
        before, _ = recurrence.fold(family, summaries, start)
        return recurrence.join(family.apply(run, recurrence.flat(before)), batch, length), final, before, transitions

    def backward(inputs, constants, before, transitions, d_outputs, d_final):
        local = recurrence.Gradients(family, chunk, inputs, constants, before, d_outputs)
        _, d_shard = local.fold_back(jnp.zeros_like(d_final))
        d_after, d_state = backward_exchange(family, transitions, d_shard, d_final)
        after, _ = local.fold_back(d_after)
        d_inputs, d_constants = local.of_inputs(after)

        def summed(x, spec):
            return lax.psum(x, tuple(sorted(spread - _names(spec))))

        return d_inputs, jax.tree.map(summed, d_constants, constants_specs), d_state

    @jax.custom_vjp
    def spread_run(inputs, constants, state):
        return spread_forward(inputs, constants, state)[0]

    def spread_forward(inputs, constants, state):
        outputs, final, before, transitions = _shard_map(
            forward,
            mesh,
            (inputs_specs, constants_specs, state_spec),
            (outputs_spec, state_spec, before_spec, transition_spec),
        )(inputs, constants, state)
        outputs, before = checkpoint_name((outputs, before), "recurrence")
        return (outputs, final), (inputs, constants, before, transitions)

    def spread_backward(residuals, cotangents):
        is_floating = lambda x, spec: spec if jnp.issubdtype(x.dtype, jnp.inexact) else None  # noqa: E731
        gradients = jax.tree.map(is_floating, residuals[0], inputs_specs), constants_specs, state_spec
        arguments = inputs_specs, constants_specs, before_spec, transition_spec, outputs_spec, state_spec
        return _shard_map(backward, mesh, arguments, gradients)(*residuals, *cotangents)

    spread_run.defvjp(spread_forward, spread_backward)
    return spread_run(inputs, constants, state)


def _chunks(family, chunk, inputs, constants, *_):
    run = family.prepare(recurrence.split(inputs, chunk), constants)
    return run, family.summarise(run)


def _shard_map(function, mesh, in_specs, out_specs):
    # What is equal on several devices is computed alike on each: nothing here needs to be checked or summed for it.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(name, str | None) for name in x)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _names(spec: PartitionSpec) -> set[str]:
    return {name for entry in spec if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)}
