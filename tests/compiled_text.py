"""What a program that was compiled for a TPU has of kernels and of copies."""

import math
import re


def kernels(text: str, name: str) -> list[str]:
    """Those whose name begins so, sorted."""
    return sorted(re.findall(rf"%\w*?({name}_[a-z_]+?)_*[.\d]* = .*custom-call\(", text))


def copies(text: str, elements: int) -> list[str]:
    """Copies and transposes of arrays of so many elements, in whatever shape."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose|copy-start)\(", text)
    return [shape for shape in found if math.prod(map(int, shape.split(","))) >= elements]
