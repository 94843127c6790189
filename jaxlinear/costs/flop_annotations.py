"""Tells the code that counts FLOPs (``costs.traced``) how often work with no fixed trip count is done."""

import re
from collections.abc import Callable
from typing import Any

import jax

_NAME = re.compile(r"annotated_(\d+)(?:_of_(\d+))?")


def jit(function: Callable[..., Any], runs: int, each: int | None = None) -> Callable[..., Any]:
    """``jax.jit`` of a function, annotated with ``runs``: how often the body of its loop runs, how many steps its kernels'
    grids have, or how many rows its grouped product takes. ``each`` is the number of floating point operations per run,
    where its products are written as sums. The result of the computation does not change.

    The annotation is in the program's name, which survives differentiation and partitioning. Do not map it (``jax.vmap``):
    more work would be done under the same name.
    """

    def annotated(*arguments):
        return function(*arguments)

    annotated.__name__ = f"annotated_{runs}" if each is None else f"annotated_{runs}_of_{each}"
    return jax.jit(annotated)


def read(name: str) -> tuple[int | None, int | None]:
    """The ``runs`` and ``each`` that were given to ``jit``, read from the program's name."""
    found = _NAME.fullmatch(name)
    runs, each = found.groups() if found else (None, None)
    return None if runs is None else int(runs), None if each is None else int(each)
