"""ListOps: nested operations on digits; the answer is the value."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from jaxlinear.data.tasks import list_ops_odds
from jaxlinear.data.tasks.task import NO_TARGET, Example, Task

OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "MAX": max,
    "MIN": min,
    "MED": lambda values: int(np.median(values)),
    "SM": lambda values: sum(values) % 10,
}
PADDING, DIGITS, OPEN, CLOSE, END = 0, 1, 11, 15, 16  # tokens: 1 to 10 are digits, 11 to 14 open an operation
_RAREST = 0.005  # of the expressions that are drawn, that are long and short enough; the others are drawn in vain
_MOST_ARGUMENTS = 100  # with more, two digits, which every length has room for, would be rarer than that
_NESTED = 0.25  # probability that an argument is an operation, as in the Long Range Arena


@dataclasses.dataclass(frozen=True)
class ListOps(Task):
    """``[MAX 2 9 [MIN 4 7] 0] =`` and, at its end, the answer, a digit. It is padded on the left to T tokens.

    Operations (maximum, minimum, median rounded down, sum modulo 10) have 2 to ``arguments`` arguments and are nested at
    most ``depth`` deep. An expression has at least ``shortest`` tokens, the ``=`` included.
    """

    NAME = "listops"
    SOURCE = (
        "Nangia and Bowman 2018 (arXiv:1804.06028); depth, arguments and lengths of 500 to 2000 of Tay et al. 2020, Long "
        "Range Arena (arXiv:2011.04006); the shorter ones are ours"
    )
    REFERENCE = (
        {"length": 64, "shortest": 16, "depth": 4, "arguments": 5},
        {"length": 256, "shortest": 64, "depth": 6, "arguments": 8},
        {"length": 2048, "shortest": 500, "depth": 10, "arguments": 10},
    )

    vocabulary = END + 1
    max_targets = 1

    length: int = 2048
    shortest: int = 500
    depth: int = 10
    arguments: int = 10

    def __post_init__(self) -> None:
        self.require(self.depth >= 1, f"depth={self.depth} must be at least 1")
        self.require(
            2 <= self.arguments <= _MOST_ARGUMENTS,
            f"arguments={self.arguments} must be at least 2 and at most {_MOST_ARGUMENTS}",
        )
        self.require(
            self.length >= 5, f"length={self.length} must be at least 5, an operation on two digits and its end"
        )
        self.require(self.shortest >= 0, f"shortest={self.shortest} must not be negative")
        # Of a number of tokens, its end included: how many expressions have as many or more, but no more than T.
        odds = list_ops_odds.lengths(self.depth, self.arguments, _NESTED, self.length - 1)
        enough = np.flatnonzero(np.cumsum(odds[::-1])[::-1] >= _RAREST)
        self.require(
            self.shortest <= enough[-1] + 1,
            f"shortest={self.shortest} must not exceed {enough[-1] + 1}: fewer than {_RAREST:.1%} of the expressions of "
            f"depth={self.depth} and arguments={self.arguments} have as many tokens and no more than length={self.length}",
        )

    @functools.cached_property
    def chance(self) -> float:
        """The likeliest value is 0 or 9, as a minimum or maximum."""
        odds = list_ops_odds.odds(self.depth, self.arguments, _NESTED, self.length - 1)
        of_values = np.sum(odds[max(self.shortest - 1, 0) :], axis=0)
        return float(np.max(of_values) / np.sum(of_values))

    def example(self, random: np.random.Generator) -> Example:
        expression: list[int] = []
        while not self.shortest <= len(expression) + 1 <= self.length or not expression:
            expression = []
            value = self._write(random, expression, self.depth)
        tokens = np.full(self.length, PADDING, np.int32)
        tokens[-1 - len(expression) :] = [*expression, END]
        targets = np.full(self.length, NO_TARGET, np.int32)
        targets[-1] = DIGITS + value
        return tokens, targets

    def _write(self, random: np.random.Generator, expression: list[int], depth: int) -> int:
        """Appends an operation to the expression and returns its value. Stops nesting once the expression is too long."""
        operation = int(random.integers(len(OPERATIONS)))
        expression.append(OPEN + operation)
        values = []
        count = int(random.integers(2, self.arguments + 1))
        nested, digits = random.random(count) < _NESTED, random.integers(10, size=count).tolist()
        for is_operation, digit in zip(nested, digits, strict=True):
            if is_operation and depth > 1 and len(expression) < self.length:
                values.append(self._write(random, expression, depth - 1))
            else:
                expression.append(DIGITS + digit)
                values.append(digit)
        expression.append(CLOSE)
        return list(OPERATIONS.values())[operation](values)
