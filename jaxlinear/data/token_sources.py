"""Sources whose documents are token ids: a field of JSONL, Parquet or Hugging Face records, or files of ids."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxlinear.data import token_files
from jaxlinear.data.compressed import stripped_suffix
from jaxlinear.data.sources import (
    RECORD_SUFFIXES,
    Record,
    Source,
    about_size,
    files_of,
    is_pipe,
    is_plain,
    json_lines,
    refuse_unread,
    without_field,
)
from jaxlinear.data.token_ids import Ids
from jaxlinear.errors import UserError


def open_tokens(
    name: str,
    ids: Ids,
    *,
    tokens_field: str | None,
    form: str | None,
    packed_rows: bool,
    suffixes: tuple[str, ...] | None,
) -> Source:
    """The source ``name`` as in ``open_source``, but of ``ids``: from the field ``tokens_field`` of its records, or from
    files of the form ``form``. With ``packed_rows`` the rows of a field form one stream, like the ids in a file."""
    if name == "python-stdlib":
        raise UserError("python-stdlib is text; tokens_field and token_files are for sources of tokens")
    if tokens_field is not None and form is not None:
        raise UserError("tokens_field is for records and token_files for files of ids; give only one of them")
    if form is not None:
        if packed_rows:
            raise UserError("packed_rows is for tokens_field, and a file of ids is already a stream; leave it out")
        return _of_files(name, ids, form, suffixes)
    assert tokens_field is not None
    source = _of_field(name, ids, tokens_field, suffixes)
    if packed_rows:
        return _mapped(source, lambda records: ids.cut(name, records))
    return _mapped(source, ids.documents)


def _of_files(name: str, ids: Ids, form: str, suffixes: tuple[str, ...] | None) -> Source:
    if form not in token_files.FORMATS:
        raise UserError(f"token_files={form!r} must be one of {', '.join(token_files.FORMATS)}")
    if name.startswith("hf:"):
        raise UserError(
            f"token_files is for files of ids, but {name} has records; name their field with --tokens_field"
        )
    files = files_of(name, suffixes, token_files.suffixes(form))
    for file in files:
        if not is_plain(file):
            raise UserError(f"{file} has records and is not a file of ids; name their field with --tokens_field")
        token_files.check(file, form)
    pipe = is_pipe(name)

    def records() -> Iterator[Record]:
        for file in files:
            yield from token_files.records(file, form, ids)

    source = Source(name, None if pipe else about_size(files, ""), records, pipe)
    if token_files.is_stream(form):
        return _mapped(source, lambda parts: ids.cut(name, parts))
    return _mapped(source, ids.documents_of_each)


def _of_field(name: str, ids: Ids, field: str, suffixes: tuple[str, ...] | None) -> Source:
    def record(origin: str, fields: Any) -> Record:
        missing = without_field(origin, fields, field, "tokens_field")
        return ids.record(origin, fields[field], field) if missing is None else missing

    if name.startswith("hf:"):
        from jaxlinear.data import hugging_face

        refuse_unread(name, suffixes=suffixes)
        return hugging_face.open_dataset(name, record)
    files = files_of(name, suffixes, RECORD_SUFFIXES)
    for file in files:
        if is_plain(file):
            raise UserError(
                f"{file} is not JSONL or Parquet and has no records; give the format of its ids with --token_files"
            )
    pipe = is_pipe(name)

    def records() -> Iterator[Record]:
        for file in files:
            if stripped_suffix(file) == ".parquet":
                from jaxlinear.data import parquet

                yield from parquet.id_records(file, field, ids)
            else:
                yield from json_lines(file, record)

    return Source(name, None if pipe else about_size(files, field), records, pipe)


def _mapped(source: Source, documents: Callable[[Iterable[Record]], Iterator[Record]]) -> Source:
    """``source`` with other records, made from its own. A source whose beginning is broken is still refused."""
    return dataclasses.replace(source, records=lambda: documents(iter(source)))
