"""The base of all synthetic tasks: examples generated from a seed, in which only the answers are to be predicted."""

import abc
import dataclasses
from typing import Any, ClassVar, Self

import numpy as np

from jaxlinear.errors import UserError

NO_TARGET = -1  # target where nothing is to be predicted
Example = tuple[np.ndarray, np.ndarray]  # tokens [T], and after each token the answer or NO_TARGET


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run provides to the tasks that it is trained or evaluated on."""

    sequence_length: int
    vocab_size: int | None = None  # of the model; None if it is chosen to suit the task
    dataset: str = ""  # for tasks that use real text
    split: str = "heldout"


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One difficulty of a task. Its fields are the options, which ``NAME:option=VALUE`` sets.

    ``example`` is a function of the generator alone. Tokens and answers are below ``vocab_size``.
    """

    NAME: ClassVar[str]
    REFERENCE: ClassVar[tuple[dict[str, Any], ...]]  # the difficulties on which a checkpoint is evaluated
    SOURCE: ClassVar[str]  # of the task and its difficulties
    READS_TEXT: ClassVar[bool] = False  # whether it needs a prepared dataset

    length: int  # tokens of an example, T

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """Number of tokens that the task uses."""

    @property
    @abc.abstractmethod
    def max_targets(self) -> int:
        """Upper bound on the number of answers in an example."""

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Accuracy to expect from knowing what answers look like, without reading the example."""

    @abc.abstractmethod
    def example(self, random: np.random.Generator) -> Example:
        """Tokens ``[T]`` and targets ``[T]``."""

    @classmethod
    def defaults(cls, setting: Setting) -> dict[str, Any]:
        """Options that follow from the run."""
        return {}

    @classmethod
    def references(cls, setting: Setting, given: set[str]) -> tuple[dict[str, Any], ...]:
        """The difficulties on which a checkpoint of this run is evaluated: one, without options of its own, if an option
        that they vary is ``given``."""
        return ({},) if given & {name for options in cls.REFERENCE for name in options} else cls.REFERENCE

    @classmethod
    def make(cls, options: dict[str, Any]) -> Self:
        """From options by name, with values as they are or as text."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for name, value in options.items():
            if name not in fields:
                raise UserError(f"{cls.NAME} has no option {name!r}; the options are {', '.join(fields)}")
            declared = fields[name].type
            kind = {"int": int, "float": float, "bool": bool, "str": str}[str(getattr(declared, "__name__", declared))]
            if isinstance(value, str) and kind is not str:
                try:
                    value = {"true": True, "false": False}[value] if kind is bool else kind(value)
                except (ValueError, KeyError):
                    raise UserError(f"{cls.NAME}: {name}={value} is not of type {kind.__name__}") from None
            values[name] = value
        return cls(**values)

    def options(self) -> dict[str, Any]:
        """All options, by name."""
        return dataclasses.asdict(self)

    def require(self, fits: bool, reason: str) -> None:
        """Raises ``UserError`` unless ``fits``."""
        if not fits:
            raise UserError(f"{self.NAME}: {reason}")


@dataclasses.dataclass(frozen=True)
class WithVocabulary(Task):
    """A task whose vocabulary is an option."""

    vocab_size: int = 8192

    @property
    def vocabulary(self) -> int:
        return self.vocab_size

    @classmethod
    def defaults(cls, setting: Setting) -> dict[str, Any]:
        """The vocabulary of the paper, limited to the model's."""
        return {} if setting.vocab_size is None else {"vocab_size": min(cls.vocab_size, setting.vocab_size)}
