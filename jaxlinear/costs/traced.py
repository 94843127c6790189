"""What a traced program computes, counted in its jaxpr."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxlinear.costs import flop_annotations


class Products(NamedTuple):
    """FLOPs of all matrix products on all devices together; a multiply-add is 2."""

    flops: int
    counted: bool  # False: some are in a loop with an unknown number of trips, and count once


def products_of(function: Callable[..., Any], *arguments: Any) -> Products:
    """``products`` of a function of arrays of these shapes."""
    return products(jax.make_jaxpr(function)(*arguments).jaxpr)


def products(jaxpr: core.Jaxpr, runs: int | None = None) -> Products:
    """The products of a kernel are what it states itself or, if it states nothing, as many as if none of its grid steps
    were skipped.

    A scan's body counts as often as it runs; of several branches, the most expensive counts. Whatever has no fixed
    number of trips counts ``runs`` times, as given by ``flop_annotations.jit``, or once if that gives nothing.
    """
    return _sum(_products(equation, runs) for equation in jaxpr.eqns)


def _products(equation, runs) -> Products:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, product = equation.invars[0].aval, equation.outvars[0].aval
        return Products(2 * product.size * math.prod(left.shape[axis] for axis in contracted), True)
    if name == "ragged_dot_general":  # each row goes to one matrix, [rows, K] by [groups, K, N]
        left, product = equation.invars[0].aval, equation.outvars[0].aval
        (contracted, _), _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        groups = product.shape[0] if len(product.shape) > len(left.shape) else 1
        flops = 2 * product.size // groups * math.prod(left.shape[axis] for axis in contracted)
        return Products(flops if runs is None else flops // left.shape[0] * runs, True)
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        if estimate:
            return Products(int(estimate.flops), True)
        steps = math.prod(params["grid_mapping"].grid) if runs is None else runs
        return _times(steps, products(params["jaxpr"]))
    if name == "cond":
        branches = [products(branch.jaxpr, runs) for branch in params["branches"]]
        return Products(max(branch.flops for branch in branches), all(branch.counted for branch in branches))
    if name == "while":
        inner = _sum(products(inner) for inner in _inner(params))
        return Products(inner.flops, not inner.flops) if runs is None else _times(runs, inner)
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name in ("jit", "pjit"):
        said, each = flop_annotations.read(params["name"])
        if said is not None and each is not None:
            return Products(said * each, True)
        runs = runs if said is None else said
    return _times(times, _sum(products(inner, runs) for inner in _inner(params)))


def _sum(parts: Iterable[Products]) -> Products:
    parts = list(parts)
    return Products(sum(part.flops for part in parts), all(part.counted for part in parts))


def _times(times: int, part: Products) -> Products:
    return part._replace(flops=times * part.flops)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
