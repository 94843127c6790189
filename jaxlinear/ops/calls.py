"""Which operations a program calls, and with what shapes, recorded while it is traced."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_HOW = {"backend", "runner", "chunk_size"}  # how a result is computed, not which

_records: list[list["Call"]] = []


class Call(NamedTuple):
    """``arguments``: those that were given, by name; of an array its ``jax.ShapeDtypeStruct``."""

    operation: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: x for name, x in self.arguments if isinstance(x, jax.ShapeDtypeStruct)}

    @property
    def options(self) -> dict[str, Any]:
        """The other arguments."""
        return {name: x for name, x in self.arguments if name not in self.arrays}


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """The calls of what is traced within it, in their order; not those that JAX takes from its cache of traces."""
    found: list[Call] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records.pop()


def recorded(operation: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The operation, whose calls ``record`` has."""
    signature = inspect.signature(operation)

    @functools.wraps(operation)
    def noted(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not _records:
            return operation(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        which = ((name, _shape(x)) for name, x in given.items() if name not in _HOW)
        _records[-1].append(Call(operation.__name__, tuple(which)))
        with record():  # what one operation is made of is not called by the program
            return operation(*args, **kwargs)

    return noted


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
