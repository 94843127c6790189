"""State tracking: the answer at every token is the product, in a group, of the tokens so far."""

import dataclasses
import itertools

import numpy as np

from jaxlinear.data.tasks.task import Example, Task


@dataclasses.dataclass(frozen=True)
class Parity(Task):
    """Random bits; the answer at each is the parity of the bits so far (the group Z2)."""

    SOURCE = "Grazzi et al. 2024 (arXiv:2411.12537): trained at lengths up to 40, judged up to 256"
    REFERENCE = tuple({"length": length} for length in (40, 64, 128, 256))

    length: int = 40

    def __post_init__(self) -> None:
        self.require(self.length >= 1, f"length={self.length} must be at least 1")

    @property
    def vocabulary(self) -> int:
        return 2

    @property
    def most_answers(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / 2

    def example(self, random: np.random.Generator) -> Example:
        tokens = random.integers(0, 2, self.length, dtype=np.int32)
        return tokens, np.cumsum(tokens, dtype=np.int32) % 2


@dataclasses.dataclass(frozen=True)
class Permutations(Task):
    """Random permutations of five objects; the answer at each is the product so far (the group S5, which is not
    solvable). Token n is the n-th permutation in lexicographic order; the product applies the earliest first."""

    SOURCE = "Merrill, Petty and Sabharwal 2024 (arXiv:2404.08819); lengths beyond 25 are ours"
    REFERENCE = tuple({"length": length} for length in (5, 10, 15, 20, 25, 50, 100))

    length: int = 25

    def __post_init__(self) -> None:
        self.require(self.length >= 1, f"length={self.length} must be at least 1")

    @property
    def vocabulary(self) -> int:
        return len(PERMUTATIONS)

    @property
    def most_answers(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / len(PERMUTATIONS)

    def example(self, random: np.random.Generator) -> Example:
        tokens = random.integers(0, len(PERMUTATIONS), self.length, dtype=np.int32)
        return tokens, np.fromiter(itertools.accumulate(tokens, lambda p, q: _PRODUCTS[p, q]), np.int32, self.length)


PERMUTATIONS = np.array(list(itertools.permutations(range(5))), np.int32)
_PLACES = 5 ** np.arange(4, -1, -1)
# [p, q] -> the index of "p, then q", which takes i to q[p[i]]. Read as numbers in base 5, the permutations are sorted.
_PRODUCTS = np.searchsorted(PERMUTATIONS @ _PLACES, PERMUTATIONS[:, PERMUTATIONS].swapaxes(0, 1) @ _PLACES).astype(
    np.int32
)
