"""The description of another program's architecture, shared by all code that reads and writes its weights."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from jaxlinear.conversion.links import Link
from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.streaming import StreamedArray


class Fields:
    """The fields of a ``config.json``. ``UserError`` names a field that is missing or that no model here can have."""

    def __init__(self, values: Mapping[str, Any], origin: str):
        self._values, self.origin = values, origin

    def optional(self, name: str) -> Any:
        """A field's value; None if it is absent."""
        return self._values.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """A field's value; ``default`` if it is absent or null. Without a default, such a field is refused."""
        value = self._values.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.origin} has no {name}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """``get`` for a positive integer."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            self.refuse(name, value, "it must be a whole number, at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """``get`` for a finite number."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # NaN is not
            self.refuse(name, value, "it must be a finite number")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """``get`` for true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "it must be true or false")
        return value

    def section(self, name: str) -> "Fields":
        """The fields of an object, under their full names; empty if it is absent or null."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, value, "it must be an object")
        return Fields({f"{name}.{key}": inner for key, inner in value.items()}, self.origin)

    def only(self, name: str, *allowed: Any, default: Any) -> Any:
        """``get`` for a field of which only the ``allowed`` values can be imported."""
        value = self.get(name, default)
        if value not in allowed:
            self.refuse(name, value, f"only {' or '.join(map(repr, allowed))} can be imported")
        return value

    def only_null(self, *names: str) -> None:
        """Refuses fields that are present and not null."""
        for name in names:
            if self.optional(name) is not None:
                self.refuse(name, self.optional(name), "only null can be imported")

    def is_null(self, name: str) -> bool:
        """Whether a field is present and null."""
        return name in self._values and self._values[name] is None

    def refuse(self, name: str, value: Any, reason: str) -> NoReturn:
        raise UserError(f"{self.origin}: {name} is {value!r}; {reason}")

    def dtype(self) -> str:
        """The dtype of the activations: the one that the weights were saved in, if a model here can have it."""
        saved = self.optional("dtype") or self.optional("torch_dtype")
        return "bfloat16" if saved == "bfloat16" else "float32"

    def rotary(self, *, fraction: float, may_scale: bool = False) -> dict[str, Any]:
        """Our keys for rotary positions, from the fields of any release of transformers: unscaled ones or, with
        ``may_scale``, Llama 3.1's."""
        names = [name for name in ("rope_scaling", "rope_parameters") if self.optional(name) not in (None, {})]
        found = [self._rotary(name, fraction, may_scale) for name in names or ["rope_parameters"]]
        if found[-1] != found[0]:  # of which transformers 5 takes the first
            self.refuse(names[0], self.optional(names[0]), f"{names[1]} says otherwise; keep the one that is right")
        return found[0]

    def _rotary(self, name: str, fraction: float, may_scale: bool) -> dict[str, Any]:
        """By one of the fields that releases have for it."""
        rope, scaled = self.section(name), {}
        kind = rope.get(f"{name}.rope_type", rope.get(f"{name}.type", "default"))
        if kind == "llama3" and may_scale:
            scaled = _scaled(rope, name)
        elif kind != "default":
            which = "only unscaled positions ('default')" + (" or 'llama3'" if may_scale else "")
            self.refuse(f"{name}.rope_type", kind, f"{which} can be imported")
        base = rope.number(f"{name}.rope_theta", self.number("rope_theta", 10_000.0))
        fraction = rope.number(f"{name}.partial_rotary_factor", self.number("partial_rotary_factor", fraction))
        return {"rotary_base": base, "rotary_fraction": fraction, **scaled}


def _scaled(rope: Fields, name: str) -> dict[str, Any]:
    for field, value in (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)):
        rope.only(f"{name}.{field}", value, default=None)
    factor = rope.number(f"{name}.factor")
    if factor < 1:
        rope.refuse(f"{name}.factor", factor, "only 1 or more can be imported")
    return {"rotary_scaling": factor, "rotary_context": rope.integer(f"{name}.original_max_position_embeddings")}


def _any(_: ModelConfig) -> bool:
    return True


def _as_they_are(_: ModelConfig, tensors: Mapping[str, StreamedArray]) -> dict[str, StreamedArray]:
    return dict(tensors)


class Family(NamedTuple):
    """An architecture of another program, under the name that it has there.

    Attributes:
      name: its ``model_type`` in a ``config.json`` of Hugging Face.
      mixers: what the pattern of a model of this family may contain.
      model: maps its fields to keys of our ``model`` section, all that determine the arithmetic.
      fields: the inverse; raises ``UserError`` if a model is not of this family.
      links: the links of a model of this family.
      main: what the pattern must contain, if anything.
      read: maps the tensors in the files of any release to those that ``links`` names.
      is_one: whether a model with such a pattern is of this family.
    """

    name: str
    mixers: tuple[str, ...]
    model: Callable[[Fields], dict[str, Any]]
    fields: Callable[[ModelConfig], dict[str, Any]]
    links: Callable[[ModelConfig], Iterator[Link]]
    main: str | None = None
    read: Callable[[ModelConfig, Mapping[str, StreamedArray]], dict[str, StreamedArray]] = _as_they_are
    is_one: Callable[[ModelConfig], bool] = _any


def renamed(tensors: Mapping[str, StreamedArray], names: Mapping[str, str]) -> dict[str, StreamedArray]:
    """Tensors under their usual names. ``names`` maps regular expressions for parts of other names to the usual parts."""
    found = {}
    for name, tensor in tensors.items():
        usual = name
        for expression, part in names.items():
            usual = re.sub(expression, part, usual)
        found[name if usual in tensors else usual] = tensor  # if both names are present, neither tensor is lost
    return found


def require(config: ModelConfig, family: str, **values: Any) -> None:
    """Raises ``UserError`` for the first key of a model whose value is not the one that all models of the family have."""
    for name, value in values.items():
        if getattr(config, name) != value:
            raise UserError(f"model.{name} is {getattr(config, name)!r}; in {family} it must be {value!r}")
