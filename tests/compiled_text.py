"""Finds kernels and copies in the text of a program compiled for a TPU."""

import math
import re


def kernels(text: str, name: str) -> list[str]:
    """The kernels whose names begin with ``name``, sorted."""
    return sorted(re.findall(rf"%\w*?({name}_[a-z_]+?)_*[.\d]* = .*custom-call\(", text))


def copies(text: str, elements: int) -> list[str]:
    """The shapes of copies and transposes of arrays with at least ``elements`` elements."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|copy-start)\(", text)
    return [shape for shape in found if math.prod(map(int, shape.split(","))) >= elements]
