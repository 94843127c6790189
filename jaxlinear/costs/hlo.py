"""The text of a compiled program (HLO after all passes): computations, their instructions, and how often each runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|body|to_apply|(?:branch|called)_computations|(?:true|false)_computation)=(?:\{([^}]*)\}|([^,\s]+))"
)
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_BYTES = {"pred": 1, "token": 0, "s4": 0.5, "u4": 0.5}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``name = shape opcode(inside), attributes``."""

    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of instructions of the same computation."""
        return tuple(re.findall(r"%([\w.\-]+)", self.inside))

    @property
    def operation(self) -> str:
        """Its origin in the traced program (``op_name``)."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, except for the condition of a loop."""
        groups = (several or one for several, one in _CALLED.findall(self.attributes))
        return tuple(name.strip().lstrip("%") for group in groups for name in group.split(","))


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each in the order in which its instructions run, and how often each runs in all (None if
    unknown, 0 if never)."""

    computations: dict[str, list[Instruction]]
    entry: str
    runs: dict[str, int | None]

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of the result of each instruction. Names are unique in the module."""
        return {line.name: size(line.shape) for lines in self.computations.values() for line in lines}

    def within(self, instruction: Instruction) -> Iterator[Instruction]:
        """All instructions that run as part of it, including itself."""
        yield instruction
        for name in instruction.called:
            for inner in self.computations.get(name, ()):
                yield from self.within(inner)


def parse(text: str) -> Module:
    """The module for the text of ``compiled.as_text()``."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(match[1], line[match.end() :]))
    return Module(computations, entry, runs(computations, entry))


def size(shape: str) -> int:
    """Bytes of a shape, summed over the arrays of a tuple. Padding by layouts is not counted."""
    total = 0.0
    for dtype, dimensions in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        width = _BYTES.get(dtype) or (int(re.findall(r"\d+", dtype)[0]) / 8 if re.search(r"\d", dtype) else 0)
        total += width * math.prod(int(n) for n in dimensions.split(",") if n)
    return int(total)


def _instruction(name: str, rest: str) -> Instruction:
    # A tuple's shape contains parentheses and spaces: the opcode is the first word before a parenthesis after it.
    end = _closing(rest, 0) if rest.startswith("(") else 0
    match = _OPCODE.search(rest, end)
    assert match, rest
    stop = _closing(rest, match.end() - 1)
    return Instruction(name, rest[: match.start()], match[1], rest[match.end() : stop], rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """The position where the parenthesis opened at ``start`` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise AssertionError(text)


def runs(computations: dict[str, list[Instruction]], entry: str) -> dict[str, int | None]:
    """``Module.runs`` for a program that begins at the computation ``entry``."""
    found: dict[str, int | None] = {name: int(name == entry) for name in computations}
    # Callers stand after their callees, so one pass backwards through the text sees every caller first.
    for name in reversed(computations):
        for instruction in computations[name]:
            times = _trips(instruction, computations) if instruction.opcode == "while" else 1
            for called in instruction.called:
                before, caller = found.get(called, 0), found[name]
                if before is None or caller is None or times is None:
                    found[called] = None
                else:
                    found[called] = before + caller * times
    return found


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """The trip count as XLA states it, or from the constant that the loop counter, which begins at 0, is compared with. The
    counter may increase by more than 1: by 2 where libtpu turns a loop of permutes into a product, two parts per trip."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    lines = {line.name: line for line in computations.get(condition[1], ())} if condition else {}
    compared = [line for line in lines.values() if line.opcode == "compare" and "direction=LT" in line.attributes]
    if len(compared) != 1:
        return None
    counter, bound = (lines.get(name) for name in compared[0].operands)
    if bound is None or bound.opcode != "constant":
        return None
    return math.ceil(int(bound.inside) / _increment(counter, loop, computations))


def _increment(counter: Instruction | None, loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How much a trip adds to the counter; 1 unless the body adds a constant to it."""
    place = re.search(r"\bindex=(\d+)", counter.attributes) if counter is not None else None
    body = re.search(r"\bbody=%?([\w.\-]+)", loop.attributes)
    lines = {line.name: line for line in computations.get(body[1], ())} if body else {}
    if not place or not lines:
        return 1
    result = next(reversed(lines.values())).operands
    new = lines.get(result[int(place[1])]) if int(place[1]) < len(result) else None
    if new is None or new.opcode != "add":
        return 1
    added = [lines[name] for name in new.operands if name in lines and lines[name].opcode == "constant"]
    return int(added[0].inside) if len(added) == 1 else 1
