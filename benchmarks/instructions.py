"""What PTX instructions and bytes imply for the time on an H100: the arithmetic of ``gpu_instructions.py``, for both sides.

It uses nothing from jaxlinear or JAX, since the comparison side has its own environment.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

# An H100 SXM, from "H100 Tensor Core GPU Architecture": 989.4e12 operations per second on dense bfloat16 matrices.
_MULTIPROCESSORS, _CLOCK, _BANDWIDTH, _OPERATIONS_A_SECOND = 132, 1.83e9, 3.35e12, 989.4e12
_SCHEDULERS = 4  # per multiprocessor, each issuing one instruction per cycle
_PRODUCTS = _OPERATIONS_A_SECOND / 2 / _MULTIPROCESSORS / _CLOCK  # multiply-adds per multiprocessor and cycle
_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)")
_SUMMED = "instructions", "issue", "matrix", "memory"


def row(kernel: str, counts: Counter, moved: int, share: float) -> dict[str, Any]:
    """``counts``: warps by instruction; ``moved``: bytes; ``share``: the fraction of these for 64 tokens of a head."""
    products = 0.0
    for opcode, warps in counts.items():
        if opcode.startswith(("mma", "wgmma.mma")):
            found = _SHAPE.search(opcode)
            assert found, opcode
            rows, columns, steps = map(int, found.groups())
            wide = 2 if "tf32" in opcode else 1  # these take twice as long
            products += wide * warps * rows * columns * steps / (4 if opcode.startswith("wgmma") else 1)
    instructions = share * sum(counts.values())
    return {
        "kernel": kernel,
        "instructions": round(instructions),
        "issue": round(instructions / _SCHEDULERS),
        "matrix": round(share * products / _PRODUCTS),
        "memory": round(share * moved / (_BANDWIDTH / _MULTIPROCESSORS / _CLOCK)),
    }


def together(name: str, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    rows = list(rows)
    sums = {key: sum(x[key] for x in rows) for key in _SUMMED}
    return {"pass": name, **sums, "larger": sum(max(x["issue"], x["memory"]) for x in rows)}
