"""What the instructions of a compiled program read and write in HBM, as ``layers.py`` lists it."""

import itertools
import math
import re
from collections.abc import Iterator

from jaxlinear.costs import hlo, programs

_ARRAY = re.compile(r"(\w+)\[([^]]*)\](\{[^}]*\})?")
# Of an instruction's attributes, what is no part of its program.
_NO_PROGRAM = re.compile(r"(?:calls|to_apply)=%?[\w.\-]+|(?:metadata|backend_config)=.*")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
_REWRITES = {"copy", "transpose", "reshape", "broadcast"}


def on_tpu(text: str) -> list[dict]:
    """The instructions of a program that take time, outside loops, with the bytes of their operands and results; of arrays
    that are only cut or updated in place, the part. "like": the first that is the same program, which libtpu compiles
    once."""
    module, found, first = hlo.parse(text), [], {}
    sizes = {line.name: _in_hbm(line.shape) for line in module.computations[module.entry]}
    for line in _working(module):
        moved = sizes[line.name] + sum(sizes[operand] for operand in set(line.operands))
        item = _item(module, line, round(moved * _part(module, line)), sizes[line.name])
        found.append(item | {"like": first.setdefault(_program(module, line), line.name)})
    return found


def on_gpu(text: str) -> list[dict]:
    """As ``on_tpu``, without "like"."""
    module, found = hlo.parse(text), []
    for line in _working(module):
        result = hlo.size(line.shape)
        moved = 2 * result if line.opcode == "copy" else programs.moved(module, line)  # to which a copy is no work
        found.append(_item(module, line, int(moved), result))
    return found


def add_cycles(found: list[dict], cycles: dict[str, float]) -> None:
    """To each instruction those of its schedule or, since libtpu writes equal programs' once, of the longest like it."""
    of_like: dict[str, float] = {}
    for item in found:
        known = cycles.get(item["name"], math.nan)
        item["cycles"] = 0.0 if math.isnan(known) else known
        of_like[item["like"]] = max(item["cycles"], of_like.get(item["like"], 0.0))
    for item in found:
        item["cycles"] = item["cycles"] or of_like[item["like"]]


def _working(module: hlo.Module) -> Iterator[hlo.Instruction]:
    """Of the program's instructions, those that do more than name arrays, or begin or end what runs beside others."""
    for line in module.computations[module.entry]:
        if line.opcode not in _FREE and not line.opcode.endswith(("-start", "-done")):
            yield line


def _item(module: hlo.Module, line: hlo.Instruction, moved: int, result: int) -> dict:
    # For GPUs XLA makes a fusion even of a single operation.
    inside = {inner.opcode for inner in module.within(line)} - _FREE - {"fusion"}
    return {
        **{"name": line.name, "kind": line.opcode, "operation": line.operation},
        **{"bytes": moved, "result": result, "rewrites": bool(inside) and inside <= _REWRITES},
    }


def _part(module: hlo.Module, line: hlo.Instruction) -> float:
    """How much of a fusion's operands and results it reads and writes."""
    whole = module.sizes[line.name] + sum(module.sizes[operand] for operand in line.operands)
    return programs.moved(module, line) / whole if line.opcode == "fusion" and whole else 1.0


def _program(module: hlo.Module, line: hlo.Instruction) -> str:
    """The same for instructions that are the same program: of a kernel its name without the number, of others their text
    without names."""
    if line.opcode == "custom-call":
        return line.name.partition(".")[0]
    within = list(module.within(line))
    numbers = {inner.name: str(n) for n, inner in enumerate(within[1:])}
    of_operands = lambda inner: re.sub(r"%([\w.\-]+)", lambda name: numbers.get(name[1], ""), inner.inside)  # noqa: E731
    of_attributes = lambda inner: _NO_PROGRAM.sub("", inner.attributes)  # noqa: E731
    texts = ((inner.shape, inner.opcode, of_operands(inner), of_attributes(inner)) for inner in within)
    return "\n".join(" ".join(text) for text in texts)


def _in_hbm(shape: str) -> int:
    """Bytes of a TPU's shape, or of a tuple of them, but for those that its layout places in VMEM."""
    arrays = (item for item in _ARRAY.findall(shape) if "S(1)" not in item[2])
    return sum(hlo.size(f"{kind}[{_elements(sizes, layout)}]") for kind, sizes, layout in arrays)


def _elements(sizes: str, layout: str) -> int:
    """Of an array with this layout, such as ``{2,0,1:T(8,128)(2,1)}``: from the minor axis on, whole tiles of 8 x 128."""
    order, tile = re.match(r"\{([\d,]*)", layout), re.search(r"T\(([\d,]+)\)", layout)
    if not sizes or order is None:
        return math.prod(map(int, filter(None, sizes.split(","))))
    axes = [int(sizes.split(",")[int(axis)]) for axis in order[1].split(",")]
    parts = list(map(int, reversed(tile[1].split(",")))) if tile else []
    return math.prod(-(-size // part) * part for size, part in itertools.zip_longest(axes, parts, fillvalue=1))
