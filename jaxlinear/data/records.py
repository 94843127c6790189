"""What a source gives: records, each a document with its origin or the reason why there is none, and how they are made
from bytes and from decoded fields."""

import codecs
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxlinear.errors import UserError

_ACCEPTABLE_BROKEN_AT_START = 100


@dataclasses.dataclass(frozen=True)
class Record:
    """One document: ``text``, the ``ids`` [T] uint32 of its tokens, or the ``error`` that broke it. ``origin`` is
    file:line, or file. After one that ``ends_file``, the rest of its file is lost too, however much that is."""

    origin: str
    text: str | None
    error: str | None = None
    ends_file: bool = False
    ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """``description`` goes into the manifest. ``size`` is the approximate number of bytes, None if unknown. Only a source
    that is a ``pipe`` cannot be iterated a second time."""

    description: str
    size: int | None
    records: Callable[[], Iterator[Record]]
    pipe: bool = False

    def __iter__(self) -> Iterator[Record]:
        """All records. A source whose first records are all broken is refused: it is not what it seems to be."""
        records = self.records()
        start = []
        for record in itertools.islice(records, _ACCEPTABLE_BROKEN_AT_START):
            start.append(record)
            if record.error is None:
                break
        if not start:
            raise UserError(f"{self.description} is empty: it has no documents")
        if start[-1].error is not None:
            raise UserError(
                f"no usable document among the first {len(start)} of {self.description}: {start[0].origin}: "
                f"{start[0].error}"
            )
        return itertools.chain(start, records)


def text_record(origin: str, content: bytes | bytearray, encoding: str = "utf-8") -> Record:
    """The record of one file or string of bytes."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return Record(
            origin, None, "UTF-16 by its first bytes; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"
        )
    if b"\0" in content:
        return Record(origin, None, "a binary file (it has NUL bytes); --token_files reads token ids")
    try:
        return Record(origin, content.decode(encoding))
    except UnicodeDecodeError as error:
        return Record(origin, None, f"not {encoding}: {error.reason} at byte {error.start}")


def without_field(origin: str, fields: object, field: str, option: str) -> Record | None:
    """A broken record if a decoded JSON value or table row lacks the field, else None."""
    if not isinstance(fields, dict):
        return Record(origin, None, f"a JSON {type(fields).__name__} where an object is expected")
    if field not in fields:
        there = ", ".join(sorted(map(str, fields))) or "none"
        return Record(origin, None, f"no field {field!r} (its fields: {there}); --{option} chooses it")
    return None


def field_record(origin: str, fields: Any, text_field: str) -> Record:
    """The record for one decoded JSON value or table row."""
    if (missing := without_field(origin, fields, text_field, "text_field")) is not None:
        return missing
    text = fields[text_field]
    if not isinstance(text, str):
        return Record(origin, None, f"field {text_field!r} is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
        return Record(origin, None, f"field {text_field!r} is not Unicode text: {error.reason}")
    return Record(origin, text)
