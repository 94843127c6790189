"""How often what a program does without fixed trips is done, said to who counts its products (``parallel.traced``)."""

import re
from collections.abc import Callable
from typing import Any

import jax

_NAME = re.compile(r"counted_(\d+)")


def jit(function: Callable[..., Any], runs: int) -> Callable[..., Any]:
    """``jax.jit`` of a function by whose products ``runs`` is meant: how often the body of its loop runs, or how many steps
    of its kernels' grids do, or how many rows its grouped product takes. It changes nothing of what is computed.

    The name of the program says so, since it stays as it is when the program is differentiated and split. Nobody maps one
    (``jax.vmap``): more would be done under the same name.
    """

    def counted(*arguments):
        return function(*arguments)

    counted.__name__ = f"counted_{runs}"
    return jax.jit(counted)


def runs_of(name: str) -> int | None:
    """What ``jit`` was told, by the name of the program."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None
