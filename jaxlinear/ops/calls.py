"""Records which operations a program calls, and with what shapes, while it is traced."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax

from jaxlinear.ops.backends import Form

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
# These decide how a result is computed, not what it is.
_HOW = {"backend", "time", "chunk_size", "call", "shards", "feeds_kernel"}

_records: list[list["Call"]] = []


class Call(NamedTuple):
    """``arguments``: those that were given, by name, with arrays as ``jax.ShapeDtypeStruct``."""

    operation: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: x for name, x in self.arguments if isinstance(x, jax.ShapeDtypeStruct)}

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that are not arrays."""
        return {name: x for name, x in self.arguments if name not in self.arrays}


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """The calls traced in this context, in order; calls that JAX takes from its trace cache are missing."""
    found: list[Call] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records.pop()


def recorded(
    operation: Callable[_Arguments, _Result], choose: Callable[..., Form] | None = None
) -> Callable[_Arguments, _Result]:
    """Wraps an operation so that ``record`` sees its calls; with ``choose``, only those whose form is a kernel: in its
    other form such an operation is made of others."""
    signature = inspect.signature(operation)

    @functools.wraps(operation)
    def noted(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not _records:
            return operation(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if choose is not None and not choose(**given).is_kernel:
            return operation(*args, **kwargs)
        which = ((name, _shape(x)) for name, x in given.items() if name not in _HOW)
        _records[-1].append(Call(operation.__name__, tuple(which)))
        with record():  # operations called inside this one are not the program's calls
            return operation(*args, **kwargs)

    return noted


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
