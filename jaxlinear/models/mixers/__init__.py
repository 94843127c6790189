"""The mixers: one file each, found by its name. ``models/mixer.py`` says what a mixer is.

A file ``NAME.py`` here holds one ``Mixer``, which is the mixer NAME; nothing else has to be edited. A mixer of another
package is named by its location, ``package.module.Class`` (docs/mixers.md).
"""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.mixer import Mixer


@functools.cache
def names() -> tuple[str, ...]:
    """The mixers of this package, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@functools.cache
def readers() -> dict[str, tuple[str, ...]]:
    """The keys of the config section ``model`` that only some mixers read, and which of this package those are."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names():
        for key in find(name).READS:
            found[key] = (*found.get(key, ()), name)
    return found


def find(name: str) -> Any:
    """The mixer's class, one of ``names()`` or of another package."""
    if name in names():
        return _own(name)
    if "." in name and all(part.isidentifier() for part in name.split(".")):
        return _foreign(name)
    raise UserError(
        f"there is no mixer {name!r}; the mixers are {', '.join(names())}, and those of other packages as "
        "package.module.Class"
    )


def reads(mixer: str, key: str) -> bool:
    """Whether the mixer reads a key of ``readers()``."""
    return key in _own_keys(find(mixer))


@functools.cache
def _own(name: str) -> Any:
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Mixer) and value.__module__ == module.__name__
    )
    return found


def _foreign(name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the missing module is one that the mixer's module imports
        raise UserError(
            f"the mixer {name!r}: there is no module {error.name!r}; install it, or add its directory to PYTHONPATH"
        ) from None
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, nnx.Module)):
        raise UserError(f"the mixer {name!r}: {module.__file__} has no nnx.Module {attribute}")
    if missing := [part for part in ("init_state", "flops") if not hasattr(found, part)]:
        raise UserError(f"the mixer {name!r} has no {' and no '.join(missing)}; docs/mixers.md says what a mixer needs")
    for key in set(_own_keys(found)) - set(readers()):
        near = difflib.get_close_matches(key, readers(), n=1, cutoff=0.0)
        raise UserError(
            f"the mixer {name!r}: READS has {key!r}, which is not a key that only some mixers read; did you mean "
            f"{near[0]!r}?"
        )
    return found


def _own_keys(mixer: type) -> tuple[str, ...]:
    return getattr(mixer, "READS", ())


def check_over_sequence(names: Iterable[str], shards: int) -> None:
    """Raises ``UserError`` for the first of these mixers whose time cannot be sharded over so many devices."""
    for name in names:
        if shards > 1 and not getattr(find(name), "OVER_SEQUENCE", False):
            raise UserError(
                f"mesh.sequence={shards}: the mixer {name!r} does not run with the sequence sharded (its class does "
                "not declare OVER_SEQUENCE, see jaxlinear/models/mixer.py); set mesh.sequence to 1"
            )
