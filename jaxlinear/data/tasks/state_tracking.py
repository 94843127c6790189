"""State tracking: the answer at every token is the product, in a group, of the tokens so far."""

import dataclasses
import itertools

import numpy as np

from jaxlinear.data.tasks.task import Example, Task

PERMUTATIONS = np.array(list(itertools.permutations(range(5))), np.int32)
_PLACES = 5 ** np.arange(4, -1, -1)
# [p, q] -> the index of "p, then q", which takes i to q[p[i]]. Read as numbers in base 5, the permutations are sorted.
_PRODUCTS = np.searchsorted(PERMUTATIONS @ _PLACES, PERMUTATIONS[:, PERMUTATIONS].swapaxes(0, 1) @ _PLACES).astype(
    np.int32
)


@dataclasses.dataclass(frozen=True)
class _StateTracking(Task):
    def __post_init__(self) -> None:
        self.require(self.length >= 1, f"length={self.length} must be at least 1")

    @property
    def max_targets(self) -> int:
        return self.length


@dataclasses.dataclass(frozen=True)
class Parity(_StateTracking):
    """Random bits; the answer at each is the parity of the bits so far (the group Z2)."""

    NAME = "parity"
    SOURCE = "Grazzi et al. 2024 (arXiv:2411.12537): trained at lengths up to 40, judged up to 256"
    REFERENCE = tuple({"length": length} for length in (40, 64, 128, 256))

    vocabulary = 2
    chance = 1 / 2

    length: int = 40

    def example(self, random: np.random.Generator) -> Example:
        tokens = random.integers(0, 2, self.length, dtype=np.int32)
        return tokens, np.cumsum(tokens, dtype=np.int32) % 2


@dataclasses.dataclass(frozen=True)
class Permutations(_StateTracking):
    """Random permutations of five objects; the answer at each is the product so far (the group S5, which is not
    solvable). Token n is the n-th permutation in lexicographic order; the product applies the earliest first."""

    NAME = "s5_permutations"
    SOURCE = "Merrill, Petty and Sabharwal 2024 (arXiv:2404.08819); lengths beyond 25 are ours"
    REFERENCE = tuple({"length": length} for length in (5, 10, 15, 20, 25, 50, 100))

    vocabulary = len(PERMUTATIONS)
    chance = 1 / vocabulary

    length: int = 25

    def example(self, random: np.random.Generator) -> Example:
        tokens = random.integers(0, len(PERMUTATIONS), self.length, dtype=np.int32)
        return tokens, np.fromiter(itertools.accumulate(tokens, lambda p, q: _PRODUCTS[p, q]), np.int32, self.length)
