"""Sources of documents: the standard library's source code, text files, JSONL, Parquet, Hugging Face datasets.

A source is an iterable of ``Record``: a text with its origin (file, and line or row), or the reason why there is none. It
gives the same records each time it is iterated; a pipe can be iterated only once. Sources of token ids are in
``token_sources.py``.
"""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import pathlib
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlinear.data import parquet
from jaxlinear.data.compressed import DamagedFile, expansion, read_chunks, stripped_suffix
from jaxlinear.data.folders import files_of_folder
from jaxlinear.data.records import Record, Source, field_record, text_record
from jaxlinear.errors import UserError

_LOG = logging.getLogger(__name__)
DEFAULT_TEXT_FIELD = "text"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
RECORD_SUFFIXES = (*_JSON_SUFFIXES, ".parquet")
DEFAULT_SUFFIXES = (".txt", ".text", ".md", ".rst", *RECORD_SUFFIXES)
_ACCEPTABLE_UNSPLIT_AT_START = 100
_LARGEST_DOCUMENT = 1 << 30  # bytes: it is held in memory whole, as text and as tokens, a few times


def open_source(
    name: str, *, text_field: str | None = None, suffixes: tuple[str, ...] | None = None, separator: str | None = None
) -> Source:
    """The source ``name``: "python-stdlib", "hf:NAME" or "hf:NAME:CONFIG", or the path of a file or a folder.

    ``text_field`` ("text") names the text in JSONL, Parquet and Hugging Face records. ``suffixes`` (``DEFAULT_SUFFIXES``)
    selects the files taken from a folder (``.gz`` and ``.zst`` may follow). ``separator`` splits plain text into
    documents; without it each file is one. Raises ``UserError`` for an option that the source does not use.
    """
    field = DEFAULT_TEXT_FIELD if text_field is None else text_field
    of_fields = functools.partial(field_record, text_field=field)
    if name == "python-stdlib":
        refuse_unread(name, text_field=text_field, suffixes=suffixes, document_separator=separator)
        return _python_stdlib()
    if name.startswith("hf:"):
        refuse_unread(name, suffixes=suffixes, document_separator=separator)
        return open_dataset(name, of_fields)
    files = files_of(name, suffixes, DEFAULT_SUFFIXES)
    plain = [is_plain(file) for file in files]
    if all(plain):
        refuse_unread(name, text_field=text_field)
    if not any(plain):
        refuse_unread(name, document_separator=separator)
    separated = None if separator is None else _Separated(name, separator)

    def records(file: pathlib.Path) -> Iterator[Record]:
        suffix = stripped_suffix(file)
        if suffix == ".parquet":
            return parquet.records(file, field)
        if suffix in _JSON_SUFFIXES:
            return json_lines(file, of_fields)
        return _plain_text(file) if separated is None else separated.documents(file)

    return source_of_files(name, files, field, records, None if separated is None else separated.check)


def files_of(name: str, suffixes: tuple[str, ...] | None, defaults: tuple[str, ...]) -> list[pathlib.Path]:
    """The file ``name`` or, if it is a folder, the files in it."""
    path = pathlib.Path(name)
    if path.is_dir():
        if suffixes is not None and not any(suffixes):
            raise UserError(f"suffixes is empty; name some, such as {defaults[0]}, or leave it out")
        return files_of_folder(path, defaults if suffixes is None else suffixes)
    if path.exists():
        refuse_unread(name, suffixes=suffixes)
        return [path]
    raise UserError(f"no source {name!r}: there is no such file or folder (nor is it python-stdlib or hf:NAME)")


def source_of_files(
    name: str,
    files: Sequence[pathlib.Path],
    field: str,
    records: Callable[[pathlib.Path], Iterator[Record]],
    check: Callable[[], None] | None = None,
) -> Source:
    """The ``records`` of each of the files, then ``check``. What is neither a file nor a folder can be read only once, and
    Parquet cannot be read from it."""
    path = pathlib.Path(name)
    pipe = not path.is_dir() and not path.is_file()
    if pipe and stripped_suffix(path) == ".parquet":
        raise UserError(f"{name} is a pipe, and Parquet must be a file; write it to one")

    def of_all() -> Iterator[Record]:
        for file in files:
            yield from records(file)
        if check is not None:
            check()

    return Source(name, None if pipe else _about_size(files, field), of_all, pipe)


class _Separated:
    """Plain text split into documents by a separator. One found in no file is refused, since each file would be one
    document: that is certain after the last file, and likely after a hundred, when a warning says so."""

    def __init__(self, name: str, separator: str):
        if not separator:
            raise UserError("document_separator must not be empty")
        try:
            self._bytes = separator.encode()
        except UnicodeEncodeError:
            raise UserError(f"document_separator {separator!r} is not Unicode text") from None
        self._name, self._separator = name, separator
        unix = separator.replace("\r\n", "\n")
        self._other_ends = unix if unix != separator else unix.replace("\n", "\r\n")
        self._split, self._whole, self._with_other_ends = set[pathlib.Path](), set[pathlib.Path](), set[pathlib.Path]()
        self._said = False  # a second pass over the source would say the same

    def documents(self, file: pathlib.Path) -> Iterator[Record]:
        line, records = 1, 0
        try:
            for content in _parts(file, self._bytes, f"is document_separator {self._separator!r} correct?"):
                records += 1
                if records == 2:
                    self._split.add(file)
                record = text_record(f"{file}:{line}", content)
                if b"\0" in content:  # e.g. an archive, parts of which may be text
                    yield dataclasses.replace(record, ends_file=True)
                    return
                yield record
                line += content.count(b"\n") + self._bytes.count(b"\n")
        except DamagedFile as error:
            if records:
                self._split.add(file)
            yield Record(f"{file}:{line}", None, str(error), ends_file=True)
            return
        if records == 1 and record.text:
            self._whole.add(file)
            if self._other_ends in record.text and self._other_ends != self._separator:
                self._with_other_ends.add(file)
            if len(self._whole) == _ACCEPTABLE_UNSPLIT_AT_START and not self._split and not self._said:
                _LOG.warning("%s the first %d plain-text files of %s", self._nowhere(), len(self._whole), self._name)
                self._said = True

    def _nowhere(self) -> str:
        return f"document_separator {self._separator!r} is nowhere in"

    def check(self) -> None:
        """Must be called after the last file."""
        if not self._whole:
            return
        files, others = len(self._whole), len(self._with_other_ends)
        if not self._split:
            advice = (
                f"{self._other_ends!r} is in {others} of them" if others else "leave it out if each is one document"
            )
            of = "" if files == 1 else f", in {files} plain-text files"
            raise UserError(f"{self._nowhere()} {self._name}{of}; {advice}")
        if self._said:
            return
        self._said = True
        _LOG.info(
            "%s: %d plain-text files are cut at %r; %d files without it are one document each%s",
            *(self._name, len(self._split), self._separator, files),
            f" ({self._other_ends!r} is in {others} of them)" if others else "",
        )


_READ_BY = {
    "text_field": "records of JSONL, Parquet or Hugging Face",
    "suffixes": "a folder",
    "document_separator": "plain text",
}


def refuse_unread(name: str, **unread: object) -> None:
    """Refuses those of these options, by name, that are given."""
    for option, value in unread.items():
        if value is not None:
            raise UserError(f"{option} does nothing for {name}: it is for {_READ_BY[option]}; leave it out")


def _about_size(files: Sequence[pathlib.Path], field: str) -> int:
    """Approximate size of the text. Files are assumed to be like the first of their kind."""
    of_kind: dict[tuple[str, str], float] = {}
    total = 0.0
    for file in files:
        kind = stripped_suffix(file), file.suffix.lower()
        if kind not in of_kind:
            if kind[0] == ".parquet":
                of_kind[kind] = parquet.expansion(file, field)
            else:
                of_kind[kind] = expansion(file) * (_share_of_field(file, field) if kind[0] in _JSON_SUFFIXES else 1)
        total += of_kind[kind] * file.stat().st_size
    return round(total)


def _share_of_field(file: pathlib.Path, field: str) -> float:
    """The share of a JSONL file that its field takes up, by its beginning: other fields may be far larger, and text that is
    not ASCII may take two or three times the bytes. 1 if no line can be parsed."""
    beginning = b""
    with contextlib.suppress(DamagedFile):
        for content in read_chunks(file, beginning=True):
            beginning += content
    found = size = 0
    for line in beginning.split(b"\n"):
        try:
            value = json.loads(line)[field]
        except (ValueError, RecursionError, TypeError, LookupError):  # reported when the records are read
            continue
        size += len(line) + 1
        if isinstance(value, str):
            found += len(value.encode(errors="surrogatepass"))
        elif isinstance(value, list):  # of ids
            found += 4 * len(value)
    return found / size if found else 1.0


def is_plain(file: pathlib.Path) -> bool:
    """Whether a file is plain text, not records of JSONL or Parquet."""
    return stripped_suffix(file) not in RECORD_SUFFIXES


def _plain_text(file: pathlib.Path) -> Iterator[Record]:
    content = bytearray()
    try:
        for chunk in read_chunks(file):
            content += chunk
            _check_size(file, content, "--document_separator cuts it")
    except DamagedFile as error:
        yield Record(str(file), None, str(error), ends_file=True)
        return
    yield text_record(str(file), content)


def json_lines(file: pathlib.Path, record: Callable[[str, Any], Record]) -> Iterator[Record]:
    """``record(origin, value)`` for each line's JSON value, and broken records for lines that are not JSON."""
    number = 0
    try:
        for number, line in enumerate(_parts(file, b"\n", "JSONL has one object per line"), start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield Record(f"{file}:{number}", None, f"not utf-8: {error.reason} at byte {error.start}")
            except (ValueError, RecursionError) as error:
                yield Record(f"{file}:{number}", None, f"not JSON with one object per line: {error}")
            else:
                yield record(f"{file}:{number}", fields)
    except DamagedFile as error:
        yield Record(f"{file}:{number + 1}", None, str(error), ends_file=True)


def _parts(file: pathlib.Path, separator: bytes, remedy: str) -> Iterator[bytes]:
    """The parts between separators, for a file of any size. A file that turns out damaged gives its complete parts first.
    A part that is too large is refused with the ``remedy``."""
    rest, searched = bytearray(), 0
    for chunk in read_chunks(file):
        rest += chunk
        begin, start = 0, max(0, searched - len(separator) + 1)  # a separator may span two chunks
        while (end := rest.find(separator, start)) >= 0:
            yield bytes(rest[begin:end])
            begin = start = end + len(separator)
        del rest[:begin]
        searched = len(rest)
        _check_size(file, rest, remedy)
    yield bytes(rest)


def _check_size(file: pathlib.Path, content: bytearray, remedy: str) -> None:
    if len(content) > _LARGEST_DOCUMENT:
        raise UserError(f"{file} has a document of more than {_LARGEST_DOCUMENT} bytes; {remedy}")


def _python_stdlib() -> Source:
    """The source files of this interpreter's standard library, each decoded as its coding line says (PEP 263)."""
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
                yield Record(str(file), None, f"invalid coding line: {error}")
                continue
            yield text_record(str(file), content, encoding)

    description = f"python-stdlib ({platform.python_implementation()} {platform.python_version()})"
    return Source(description, sum(file.stat().st_size for file in files), records)


def open_dataset(name: str, record: Callable[[str, Any], Record]) -> Source:
    """``name`` is hf:NAME or hf:NAME:CONFIG. Gives ``record(origin, fields)`` for each row of the training split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs the datasets package: pip install jaxlinear[hf]") from error
    path, _, config = name.removeprefix("hf:").partition(":")
    if not path.strip("/ "):
        raise UserError(f"{name!r} does not name a dataset; write hf:NAME or hf:NAME:CONFIG")
    try:
        dataset = datasets.load_dataset(path, config or None, split="train")
    except (OSError, ValueError, RuntimeError) as error:  # not found, no connection, no such configuration, a script
        raise UserError(f"{name} cannot be loaded: {error}") from error

    def records() -> Iterator[Record]:
        for row, fields in enumerate(dataset, start=1):
            yield record(f"{name}:{row}", fields)

    return Source(name, None, records)
