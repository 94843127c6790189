"""Where documents come from: the standard library's sources, text files, JSONL, Parquet, Hugging Face datasets.

A source is an iterable of ``Record``: a text with its origin (file, and line or row), or the reason why there is none.
It can be iterated several times and gives the same records every time.
"""

import collections
import dataclasses
import io
import itertools
import json
import logging
import os
import pathlib
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence

from jaxlinear.data.compressed import (
    DamagedFile,
    expansion,
    read_all,
    read_chunks,
    stripped_suffix,
)
from jaxlinear.errors import UserError

_LOG = logging.getLogger(__name__)
DEFAULT_TEXT_FIELD = "text"
DEFAULT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson", ".json", ".parquet")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ACCEPTABLE_BROKEN_AT_START = 100


@dataclasses.dataclass(frozen=True)
class Record:
    """One document: ``text``, or None and the ``error`` that broke it. ``origin`` is file:line, or file. With one that
    ``ends_file``, all that is behind it in its file is lost too, however much that is."""

    origin: str
    text: str | None
    error: str | None = None
    ends_file: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """``description`` goes into the manifest; ``size`` is about the number of bytes, None where that is not known."""

    description: str
    size: int | None
    records: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[Record]:
        """All records; a source that starts with nothing but broken ones is refused, for it is not what it seems."""
        records = self.records()
        start = []
        for record in records:
            start.append(record)
            if record.text is not None:
                break
            if len(start) == _ACCEPTABLE_BROKEN_AT_START:
                break
        if not start:
            raise UserError(f"{self.description} is empty: there is no document in it")
        if start[-1].text is None:
            raise UserError(
                f"no usable document among the first {len(start)} of {self.description}: {start[0].origin}: "
                f"{start[0].error}"
            )
        return itertools.chain(start, records)


def open_source(
    name: str,
    *,
    text_field: str | None = None,
    suffixes: tuple[str, ...] | None = None,
    separator: str | None = None,
) -> Source:
    """The source ``name``: "python-stdlib", "hf:NAME" or "hf:NAME:CONFIG", or the path of a file or a folder.

    ``text_field`` ("text") names the text in JSONL, Parquet and Hugging Face records. ``suffixes`` (``DEFAULT_SUFFIXES``)
    are the files taken from a folder (``.gz`` and ``.zst`` may follow). ``separator`` cuts plain text into documents; else
    one file is one. ``UserError`` for one that is given and that nothing of the source reads.
    """
    field = DEFAULT_TEXT_FIELD if text_field is None else text_field
    if name == "python-stdlib":
        _refuse(name, text_field=text_field, suffixes=suffixes, document_separator=separator)
        return _python_stdlib()
    if name.startswith("hf:"):
        from jaxlinear.data import hugging_face

        _refuse(name, suffixes=suffixes, document_separator=separator)
        return hugging_face.open_dataset(name, field)
    path = pathlib.Path(name)
    if path.is_dir():
        files = _files_of_folder(path, DEFAULT_SUFFIXES if suffixes is None else suffixes)
    elif path.exists():
        _refuse(name, suffixes=suffixes)
        files = [path]
    else:
        raise UserError(f"no source {name!r}: there is no such file or folder (nor is it python-stdlib or hf:NAME)")
    plain = [_is_plain(file) for file in files]
    if all(plain):
        _refuse(name, text_field=text_field)
    if not any(plain):
        _refuse(name, document_separator=separator)
    size = _about_size(files, field)

    def records() -> Iterator[Record]:
        for file in files:
            yield from _records_of_file(file, field, separator)

    return Source(name, size, records)


_READ_BY = {
    "text_field": "records of JSONL, Parquet or Hugging Face",
    "suffixes": "a folder",
    "document_separator": "plain text",
}


def _refuse(name: str, **unread: object) -> None:
    for option, value in unread.items():
        if value is not None:
            raise UserError(f"{option} does nothing for {name}: it is for {_READ_BY[option]}; leave it out")


def _about_size(files: Sequence[pathlib.Path], text_field: str) -> int:
    """Of the content, for which the files of a kind that is compressed are taken to be as the first of them."""
    of_kind: dict[str, float] = {}
    total = 0.0
    for file in files:
        kind = file.suffix.lower()
        if kind not in of_kind:
            of_kind[kind] = _expansion(file, text_field)
        total += of_kind[kind] * file.stat().st_size
    return round(total)


def _expansion(file: pathlib.Path, text_field: str) -> float:
    if stripped_suffix(file) != ".parquet":
        return expansion(file)
    from jaxlinear.data import parquet

    return parquet.expansion(file, text_field)


def _is_plain(file: pathlib.Path) -> bool:
    return stripped_suffix(file) not in (*_JSON_SUFFIXES, ".parquet")


def _files_of_folder(folder: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    """Links are followed. What several names lead to is read once, which ends loops of links too: by the first name, so
    the order that the disk lists names in is no matter."""
    files, others = [], collections.Counter[str]()
    seen = {os.path.realpath(folder)}

    def is_new(path: pathlib.Path) -> bool:
        real = os.path.realpath(path)
        known = real in seen
        seen.add(real)
        return not known

    for directory, subdirectories, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        shown = sorted(name for name in subdirectories if not name.startswith("."))
        subdirectories[:] = [name for name in shown if is_new(pathlib.Path(directory, name))]
        for name in sorted(names):
            if name.startswith("."):
                continue
            file = pathlib.Path(directory, name)
            if not file.exists() and stripped_suffix(file) in (
                "",
                *suffixes,
            ):  # without a suffix it may have been a folder
                raise UserError(f"{file} is a link to {os.readlink(file)}, which is not there; mend or remove it")
            if stripped_suffix(file) in suffixes:
                if not file.is_file():  # to read a pipe would be to wait for who writes it
                    raise UserError(f"{file} is no file but a pipe, a socket or a device; remove it")
                if is_new(file):
                    files.append(file)
            else:
                others[stripped_suffix(file) or name] += 1
    if not files:
        there = f"; there are {', '.join(name for name, _ in others.most_common(5))}" if others else " and no other"
        raise UserError(f"{folder} has no file with a suffix of {', '.join(suffixes)}{there} (--suffixes chooses)")
    if others:  # as .jsonl.xz beside .jsonl.gz: who has both may think that both are read
        there = ", ".join(f"{count} {name}" for name, count in others.most_common(5))
        more = ", ..." if len(others) > 5 else ""
        _LOG.info("%s: %d files are read; left out are %s%s (--suffixes chooses)", folder, len(files), there, more)
    return sorted(files, key=lambda file: file.as_posix())


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}), and its text would be left out") from error


def _records_of_file(file: pathlib.Path, text_field: str, separator: str | None) -> Iterator[Record]:
    suffix = stripped_suffix(file)
    if suffix == ".parquet":
        from jaxlinear.data import parquet

        return parquet.records(file, text_field)
    if suffix in _JSON_SUFFIXES:
        return _json_lines(file, text_field)
    return _plain_text(file, separator)


def _plain_text(file: pathlib.Path, separator: str | None) -> Iterator[Record]:
    try:
        content = read_all(file)
    except DamagedFile as error:
        yield Record(str(file), None, str(error), ends_file=True)
        return
    record = text_record(str(file), content)
    if record.text is None or separator is None:
        yield record
        return
    line = 1
    for text in record.text.split(separator):
        yield Record(f"{file}:{line}", text)
        line += text.count("\n") + separator.count("\n")


def text_record(origin: str, content: bytes, encoding: str = "utf-8") -> Record:
    """The record of one file or string of bytes."""
    if b"\0" in content:
        return Record(origin, None, "a binary file (it has NUL bytes)")
    try:
        return Record(origin, content.decode(encoding))
    except UnicodeDecodeError as error:
        return Record(origin, None, f"not {encoding}: {error.reason} at byte {error.start}")


def field_record(origin: str, fields: object, text_field: str) -> Record:
    """The record of one decoded JSON value or table row."""
    if not isinstance(fields, dict):
        return Record(origin, None, f"a JSON {type(fields).__name__} where an object is expected")
    if text_field not in fields:
        there = ", ".join(sorted(map(str, fields))) or "none"
        return Record(origin, None, f"no field {text_field!r} (its fields: {there}); --text_field chooses")
    text = fields[text_field]
    if not isinstance(text, str):
        return Record(origin, None, f"field {text_field!r} is not a string but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return Record(origin, None, f"field {text_field!r} is not Unicode text: {error.reason}")
    return Record(origin, text)


def _json_lines(file: pathlib.Path, text_field: str) -> Iterator[Record]:
    number = 0
    lines = _lines(file)
    while True:
        number += 1
        origin = f"{file}:{number}"
        try:
            line = next(lines, None)
        except DamagedFile as error:
            yield Record(origin, None, str(error), ends_file=True)
            return
        if line is None:
            return
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield Record(origin, None, f"not utf-8: {error.reason} at byte {error.start}")
        except (ValueError, RecursionError) as error:
            yield Record(origin, None, f"not JSON, one object a line: {error}")
        else:
            yield field_record(origin, fields, text_field)


def _lines(file: pathlib.Path) -> Iterator[bytes]:
    """Lines without their end; a file that turns out damaged gives its whole lines first."""
    rest: list[bytes] = []
    for chunk in read_chunks(file):
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    if last := b"".join(rest):
        yield last


def _python_stdlib() -> Source:
    """The sources of this interpreter's standard library, each decoded as its coding line says (PEP 263)."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in sorted(root.rglob("*.py"), key=lambda file: file.as_posix())
        if not {"site-packages", "dist-packages"} & set(file.relative_to(root).parts)
    ]

    def records() -> Iterator[Record]:
        for file in files:
            content = file.read_bytes()
            try:
                encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            except SyntaxError as error:
                yield Record(str(file), None, f"no valid coding line: {error}")
                continue
            yield text_record(str(file), content, encoding)

    description = f"python-stdlib ({platform.python_implementation()} {platform.python_version()})"
    return Source(description, sum(file.stat().st_size for file in files), records)
