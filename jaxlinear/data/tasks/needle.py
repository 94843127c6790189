"""A pass key hidden in real text, to be recalled at the end."""

import collections
import dataclasses
import functools
from typing import Any

import numpy as np

from jaxlinear.data.loader import ExampleTable
from jaxlinear.data.manifest import read_manifest
from jaxlinear.data.tasks.task import NO_TARGET, Example, Setting, Task
from jaxlinear.data.tokenizer import Tokenizer, load_tokenizer

_SAMPLED_KEYS = 4_000  # used to estimate the accuracy by chance
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"


@dataclasses.dataclass(frozen=True)
class PassKey(Task):
    """One document: text of a prepared dataset with a sentence containing a number of ``digits`` digits at ``depth`` (0 the
    beginning, 1 the end; -1 anywhere), and at the end a question whose answer is the number.

    The answer is the tokens that the tokenizer makes of the number. Each is predicted from the true tokens before it, so
    all are right exactly if greedy decoding gives the number.
    """

    NAME = "passkey"
    SOURCE = (
        "Mohtashami and Jaggi 2023 (arXiv:2305.16300), whose sentences these are; the text is the dataset's, as in the "
        "needle tests of long contexts; lengths and depths are ours"
    )
    READS_TEXT = True
    REFERENCE = tuple({"depth": depth} for depth in DEPTHS)

    length: int
    depth: float = -1.0
    digits: int = 5
    dataset: str = ""
    split: str = "heldout"

    def __post_init__(self) -> None:
        self.require(bool(self.dataset), "it needs text: give data.path, --data or the option dataset")
        self.require(
            0 <= self.depth <= 1 or self.depth == -1, f"depth={self.depth} must be between 0 and 1, or -1 for any"
        )
        self.require(1 <= self.digits <= 18, f"digits={self.digits} must be between 1 and 18")
        needed = sum(map(len, self._parts(10**self.digits - 1)))
        self.require(
            self.length >= needed,
            f"length={self.length} must be at least the {needed} tokens that are needed without any text",
        )
        text = self._table.targets
        self.require(
            self.length <= text // 2,
            f"length={self.length} must be at most half of the {text} tokens in the {self.split} split of "
            f"{self.dataset}",
        )

    @classmethod
    def defaults(cls, setting: Setting) -> dict[str, Any]:
        return {"length": setting.sequence_length, "dataset": setting.dataset, "split": setting.split}

    @classmethod
    def references(cls, setting: Setting, given: set[str]) -> tuple[dict[str, Any], ...]:
        """Each depth at the training length and at twice it. A given length or depth replaces these."""
        lengths = ({},) if "length" in given else tuple({"length": k * setting.sequence_length} for k in (1, 2))
        depths = super().references(setting, given)
        return tuple(length | depth for length in lengths for depth in depths)

    @property
    def vocabulary(self) -> int:
        return self._table.manifest.vocab_size

    @property
    def max_targets(self) -> int:
        return self.digits + 1  # as bytes: the digits and the space before them

    @functools.cached_property
    def chance(self) -> float:
        """Estimated from many keys: how often the likeliest token at each position of the answer is right. For bytes this
        is always for the space before the number, and a tenth of the time for each digit."""
        keys = np.random.default_rng(0).integers(10**self.digits, size=_SAMPLED_KEYS)
        counts = collections.Counter(place for key in keys for place in enumerate(self._answer(int(key)).tolist()))
        likeliest: dict[int, int] = {}
        for (place, _), count in counts.items():
            likeliest[place] = max(likeliest.get(place, 0), count)
        return sum(likeliest.values()) / counts.total()

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.dataset)

    @functools.cached_property
    def _table(self) -> ExampleTable:
        return ExampleTable(self.dataset, self.split, read_manifest(self.dataset).block_length)

    @functools.cached_property
    def _question(self) -> np.ndarray:
        return self._tokenizer.encode(_QUESTION)

    def _answer(self, key: int) -> np.ndarray:
        question, whole = self._question, self._tokenizer.encode(f"{_QUESTION} {self._digits(key)}")
        self.require(
            len(whole) > len(question) and np.array_equal(whole[: len(question)], question),
            "the tokenizer merges the question with the answer",
        )
        return whole[len(question) :]

    def _digits(self, key: int) -> str:
        return str(key).zfill(self.digits)

    def _parts(self, key: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens of the sentence, of the question, and of its answer."""
        return self._tokenizer.encode(_NEEDLE.format(key=self._digits(key))), self._question, self._answer(key)

    def _text(self, random: np.random.Generator, count: int) -> np.ndarray:
        """``count`` tokens from a random position of the split on, without the tokens between documents."""
        taken: list[np.ndarray] = []
        block, missing = int(random.integers(self._table.examples)), count
        skipped = int(random.integers(self._table.manifest.block_length))
        while missing > 0:
            read = self._table.read(np.array([block % self._table.examples]))
            tokens = read["tokens"][0][read["segment_ids"][0] > 0][skipped:]
            tokens = tokens[tokens != self._tokenizer.document_token][:missing]
            taken.append(tokens)
            block, missing, skipped = block + 1, missing - len(tokens), 0
        return np.concatenate(taken) if taken else np.zeros(0, np.int32)

    def example(self, random: np.random.Generator) -> Example:
        needle, question, answer = self._parts(int(random.integers(10**self.digits)))
        # The last token of the answer is never an input.
        text = self._text(random, self.length - len(needle) - len(question) - len(answer))
        depth = random.random() if self.depth == -1 else self.depth
        before, after = np.split(text, [round(depth * len(text))])
        document = self._tokenizer.document_token
        stream = np.concatenate([[document], before, needle, after, question, answer]).astype(np.int32)
        targets = np.full(self.length, NO_TARGET, np.int32)
        targets[-len(answer) :] = answer
        return stream[:-1], targets
