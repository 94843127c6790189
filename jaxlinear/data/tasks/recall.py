"""Associative recall: a key appears again, and the answer is the value it had."""

import dataclasses
import functools

import numpy as np

from jaxlinear.data.tasks.task import NO_TARGET, Example, WithVocabulary

_MOST_POWER = 10  # with 100 and 4,096 tokens the weights are beyond float64


@dataclasses.dataclass(frozen=True)
class MultiQueryRecall(WithVocabulary):
    """MQAR: ``pairs`` of a key and a value, then every key once more among filler; its value is the answer after it.

        tokens   k1 v1 k2 v2  0  0 k2  0  0  0 k1  0
        targets                    v2          v1

    Keys are from the lower half of the vocabulary without 0, values from the upper half; no key or value occurs twice. At
    most every second token is a query; position number d after the pairs is drawn with weight ``d ** (power - 1)``, which
    favours near ones. Filler is token 0 or, with ``random_filling``, any token that is not a key of the example.
    """

    NAME = "mqar"
    SOURCE = "Arora et al. 2023, Zoology (arXiv:2312.04927); the difficulties are those of its figure 2"
    REFERENCE = (
        {"length": 64, "pairs": 4},
        {"length": 128, "pairs": 8},
        {"length": 256, "pairs": 16},
        {"length": 512, "pairs": 64},
    )

    length: int = 64
    pairs: int = 8
    power: float = 0.01
    random_filling: bool = False

    def __post_init__(self) -> None:
        self.require(self.pairs >= 1, f"pairs={self.pairs} must be at least 1")
        self.require(
            self.length % 2 == 0 and self.length >= 4 * self.pairs,
            f"length={self.length} must be even and at least {4 * self.pairs}, four tokens a pair",
        )
        self.require(
            self.vocab_size >= 2 * self.pairs + 2,
            f"vocab_size={self.vocab_size} must be at least {2 * self.pairs + 2} for pairs={self.pairs}",
        )
        self.require(0 < self.power <= _MOST_POWER, f"power={self.power} must be above 0 and at most {_MOST_POWER}")

    @property
    def max_targets(self) -> int:
        return self.pairs

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """Probabilities of the query positions after the pairs, ``[(T - 2 pairs) / 2]``."""
        weights = np.arange(1, self.length // 2 - self.pairs + 1) ** (self.power - 1.0)
        return weights / weights.sum()

    def example(self, random: np.random.Generator) -> Example:
        half = self.vocab_size // 2
        keys = 1 + random.choice(half - 1, self.pairs, replace=False)
        values = half + random.choice(self.vocab_size - half, self.pairs, replace=False)
        places = random.choice(len(self._places), self.pairs, replace=False, p=self._places)
        at = 2 * self.pairs + 2 * places
        tokens = np.zeros(self.length, np.int32)
        if self.random_filling:
            others = np.setdiff1d(np.arange(self.vocab_size), keys)
            tokens[:] = others[random.integers(len(others), size=self.length)]
        tokens[0 : 2 * self.pairs : 2], tokens[1 : 2 * self.pairs : 2] = keys, values
        tokens[at] = keys
        targets = np.full(self.length, NO_TARGET, np.int32)
        targets[at] = values
        return tokens, targets


@dataclasses.dataclass(frozen=True)
class InductionHeads(WithVocabulary):
    """Random tokens. A special token, 0, appears once among them and once more at the end, where the answer is the token
    that followed its first occurrence."""

    NAME = "induction"
    SOURCE = (
        "Olsson et al. 2022 (arXiv:2209.11895); in this form Fu, Dao et al. 2022, H3 (arXiv:2212.14052); vocabulary and "
        "lengths, trained at 256, of Gu and Dao 2023, Mamba (arXiv:2312.00752), section 4.1.2"
    )
    REFERENCE = tuple({"length": length} for length in (64, 128, 256, 512, 1024, 2048, 4096))

    max_targets = 1

    length: int = 256
    vocab_size: int = 16

    def __post_init__(self) -> None:
        self.require(self.length >= 3, f"length={self.length} must be at least 3")
        self.require(self.vocab_size >= 3, f"vocab_size={self.vocab_size} must be at least 3")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def example(self, random: np.random.Generator) -> Example:
        tokens = random.integers(1, self.vocab_size, self.length, dtype=np.int32)
        place = int(random.integers(self.length - 2))
        tokens[[place, -1]] = 0
        targets = np.full(self.length, NO_TARGET, np.int32)
        targets[-1] = tokens[place + 1]
        return tokens, targets
