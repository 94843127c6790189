"""What an operation publishes of itself: all that is needed to run it on sharded arrays, to count it and to check it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlinear.ops.backends import Form

Arrays = dict[str, jax.Array]  # arguments by name; those that are None are missing
Axes = tuple[str | None, ...]  # logical axes; those at the end may be left out
TIME = ("batch", "time")


def _unchanged(arrays: Arrays, form: Form) -> Arrays:
    return arrays


@dataclasses.dataclass(frozen=True)
class Spec:
    """An operation of ``jaxlinear.ops``. The axes of heads or channels have the logical name ``axis``.

    Attributes:
      operation: the public function.
      choose: ``choose(**arrays, **options, sharded=...) -> Form`` for the arrays of one device, which may be
        ``jax.ShapeDtypeStruct``; ``sharded``: whether they are a shard of time.
      axes: ``axes(arrays, axis)``, the logical axes of each array.
      results: for each result, the argument that it is sharded like.
      axis: the logical axis, unless the caller names another.
      plain: the form that takes the kernel's place.
      outputs: names of the results.
      over_time: what one token needs of those before it: ``"tokens"`` nothing; ``"recurrence"`` a state, which shards
        of time exchange (the operation then takes ``time``); ``"parts"`` what the operations of its plain form need,
        which it calls through ``call``; ``"halo"`` the last tokens (``parallel.operations``).
      complete: ``complete(arrays, form)``: arrays with what the form needs on a mesh, such as an empty state.
      parameters: arguments whose gradients devices sum in the dtype that ``parallel.gradient_dtype`` names.
      parts: the operations of the plain form, if there are several.
      takes_shards: whether it takes ``shards``, into how many parts the mesh divides T and the axis.
    """

    operation: Callable[..., Any]
    choose: Callable[..., Form]
    axes: Callable[[Mapping[str, Any], str | None], dict[str, Axes]]
    results: tuple[str, ...]
    axis: str | None = None
    plain: str = "chunked"
    outputs: tuple[str, ...] = ("output", "last state")
    over_time: str = "tokens"
    complete: Callable[[Arrays, Form], Arrays] = _unchanged
    parameters: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    takes_shards: bool = False

    @property
    def name(self) -> str:
        return self.operation.__name__

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the arguments that may only be given by name."""
        parameters = inspect.signature(self.operation).parameters.values()
        return tuple(one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY)

    def bind(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
        """The arrays and the other arguments of a call, by name; arrays that are None are among the others."""
        given = inspect.signature(self.operation).bind(*args, **kwargs).arguments
        names = self.axes(given, self.axis)
        arrays = {name: jax.numpy.asarray(x) for name, x in given.items() if name in names and x is not None}
        return arrays, {name: x for name, x in given.items() if name not in arrays}


def directly(spec: Spec) -> Callable[..., Any]:
    """How an operation calls another one: as it is, on arrays that are whole. On a mesh it is ``parallel.operations``'
    ``on_mesh`` instead."""
    return spec.operation
