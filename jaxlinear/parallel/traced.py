"""What a traced program computes, counted in its jaxpr."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def product_flops_of(function: Callable[..., Any], *arguments: Any) -> int:
    """``product_flops`` of a function of arrays of these shapes."""
    return product_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def product_flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of all matrix products on all devices together (a multiply-add is 2). Of a kernel what it says of itself, or,
    if it says nothing, as many as if none of its grid's steps were passed over.

    A scan's body counts as often as it runs, that of a ``while`` once, of branches the dearest.
    """
    return sum(_flops(equation) for equation in jaxpr.eqns)


def _flops(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, product = equation.invars[0].aval, equation.outvars[0].aval
        return 2 * product.size * math.prod(left.shape[axis] for axis in contracted)
    if name == "ragged_dot_general":  # each row goes to one matrix, [rows, K] by [groups, K, N]
        left, product = equation.invars[0].aval, equation.outvars[0].aval
        (contracted, _), _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        per_row = math.prod(left.shape[axis] for axis in contracted)
        groups = product.shape[0] if len(product.shape) > len(left.shape) else 1
        return 2 * product.size // groups * per_row
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        if estimate:
            return int(estimate.flops)
        return math.prod(params["grid_mapping"].grid) * product_flops(params["jaxpr"])
    if name == "cond":
        return max(product_flops(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return times * sum(product_flops(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
