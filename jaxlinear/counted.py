"""How often what a program does without fixed trips is done, said to who counts its products (``parallel.traced``)."""

import re
from collections.abc import Callable
from typing import Any

import jax

_NAME = re.compile(r"counted_(\d+)(?:_of_(\d+))?")


def jit(function: Callable[..., Any], runs: int, each: int | None = None) -> Callable[..., Any]:
    """``jax.jit`` of a function by whose products ``runs`` is meant: how often the body of its loop runs, or how many steps
    of its kernels' grids do, or how many rows its grouped product takes. ``each``: the floating point operations of one of
    these, where its products are written as sums. It changes nothing of what is computed.

    The name of the program says so, since it stays as it is when the program is differentiated and split. Nobody maps one
    (``jax.vmap``): more would be done under the same name.
    """

    def counted(*arguments):
        return function(*arguments)

    counted.__name__ = f"counted_{runs}" if each is None else f"counted_{runs}_of_{each}"
    return jax.jit(counted)


def told(name: str) -> tuple[int | None, int | None]:
    """The runs and the operations of each that ``jit`` was told, by the name of the program."""
    found = _NAME.fullmatch(name)
    runs, each = found.groups() if found else (None, None)
    return None if runs is None else int(runs), None if each is None else int(each)
