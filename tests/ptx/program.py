"""Parses PTX."""

import re
from typing import NamedTuple

_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+ [\d, ]+\n?)*)\{(.*?)\n\}", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class Instruction(NamedTuple):
    opcode: str
    operands: tuple  # names, numbers as text, lists of them for {...}, (name, offset) for [...]
    predicate: str | None
    unless: bool  # execute where the predicate does not hold


class Program(NamedTuple):
    name: str
    parameters: list[str]
    threads: int
    instructions: list[Instruction]
    labels: dict[str, int]


def read(text: str) -> list[Program]:
    """The kernels in a file's text."""
    return [_program(*found.groups()) for found in _ENTRY.finditer(re.sub(r"//.*", "", text))]


def _program(name: str, parameters: str, directives: str, body: str) -> Program:
    instructions: list[Instruction] = []
    labels = {}
    for statement in re.split(r";|(?<=:)\s*\n", body):
        statement = " ".join(statement.split())
        if found := re.fullmatch(r"(\$\w+):", statement):
            labels[found[1]] = len(instructions)
        elif statement and not statement.startswith("."):
            instructions.append(_instruction(statement))
    threads = [int(x) for x in re.findall(r"\d+", directives.partition(".reqntid")[2].partition("\n")[0])]
    assert threads, f"{name} does not say of how many threads"
    threads += [1] * (3 - len(threads))
    # Warp numbers are below that of the matrix unit.
    assert threads[1:] == [1, 1] and threads[0] <= 480, f"{name}: {directives}"
    return Program(name, re.findall(r"\w+_param_\d+", parameters), threads[0], instructions, labels)


def _instruction(statement: str) -> Instruction:
    predicate, unless = None, False
    if statement.startswith("@"):
        predicate, _, statement = statement[1:].partition(" ")
        unless, predicate = predicate.startswith("!"), predicate.lstrip("!")
    opcode, _, operands = statement.partition(" ")
    return Instruction(opcode, tuple(map(_operand, _OPERAND.findall(operands))), predicate, unless)


def _operand(text: str):
    if text.startswith("{"):
        return [x.strip() for x in text[1:-1].split(",")]
    if text.startswith("["):
        name, _, offset = text[1:-1].replace(" ", "").partition("+")
        return name, int(offset or 0)
    return text
