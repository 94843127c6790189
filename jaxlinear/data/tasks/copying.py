"""Selective copying: the tokens to remember are at random positions among filler."""

import dataclasses

import numpy as np

from jaxlinear.data.tasks.task import NO_TARGET, Example, WithVocabulary


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(WithVocabulary):
    """``count`` data tokens, in order, at random positions among filler (token 0), then as many markers (token 1). The
    answer at marker number i is data token number i."""

    NAME = "selective_copying"
    SOURCE = "Gu and Dao 2023, Mamba (arXiv:2312.00752), section 4.1.1, after Jing et al. 2019 (arXiv:1706.02761)"
    REFERENCE = tuple({"length": length, "count": 16} for length in (256, 1024, 4096))

    length: int = 4096
    count: int = 16
    vocab_size: int = 16

    def __post_init__(self) -> None:
        self.require(self.count >= 1, f"count={self.count} must be at least 1")
        self.require(
            self.length >= 2 * self.count, f"length={self.length} must be at least {2 * self.count}, twice count"
        )
        self.require(self.vocab_size >= 4, f"vocab_size={self.vocab_size} must be at least 4")

    @property
    def max_targets(self) -> int:
        return self.count

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def example(self, random: np.random.Generator) -> Example:
        before = self.length - self.count
        data = random.integers(2, self.vocab_size, self.count, dtype=np.int32)
        tokens = np.zeros(self.length, np.int32)
        tokens[np.sort(random.choice(before, self.count, replace=False))] = data
        tokens[before:] = 1
        targets = np.full(self.length, NO_TARGET, np.int32)
        targets[before:] = data
        return tokens, targets
