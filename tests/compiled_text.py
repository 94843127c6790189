"""Finds kernels and copies in the text of a program compiled for a TPU."""

import math
import re


def kernels(text: str, name: str) -> list[str]:
    """The kernels whose names begin with ``name``, sorted."""
    return sorted(re.findall(rf"%\w*?({name}_[a-z_]+?)_*[.\d]* = .*custom-call\(", text))


def copies(text: str, elements: int) -> list[str]:
    """The shapes of copies and transposes of arrays with at least ``elements`` elements."""
    return _large(text, "copy|transpose|copy-start", elements)


def rearrangements(text: str, elements: int) -> list[str]:
    """The shapes of arrays with at least ``elements`` elements that the program writes as copies of others, in another
    order, with other axes or repeated."""
    return _large(text[text.index("\nENTRY ") :], "copy|transpose|reshape|broadcast|copy-start", elements)


def with_last_axis(text: str, *sizes: int) -> list[str]:
    """The shapes with one of these last axes, of arrays that are written outside fusions."""
    shapes = re.findall(r"\[([\d,]+)\]", text[text.index("\nENTRY ") :])
    return [shape for shape in shapes if int(shape.rpartition(",")[2]) in sizes]


def _large(text, kinds, elements):
    found = re.findall(rf"= \w+\[([\d,]+)\]\S* (?:{kinds})\(", text)
    return [shape for shape in found if math.prod(map(int, shape.split(","))) >= elements]
