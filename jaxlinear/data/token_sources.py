"""Sources whose documents are token ids: a field of JSONL, Parquet or Hugging Face records, or files of ids."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxlinear.data import parquet, sources, token_files
from jaxlinear.data.compressed import stripped_suffix
from jaxlinear.data.records import Record, Source, without_field
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
    return _mapped(source, functools.partial(ids.split, name) if packed_rows else ids.documents)


def _of_files(name: str, ids: Ids, form: str, suffixes: tuple[str, ...] | None) -> Source:
    if form not in token_files.FORMATS:
        raise UserError(f"token_files={form!r} must be one of {', '.join(token_files.FORMATS)}")
    if name.startswith("hf:"):
        raise UserError(
            f"token_files is for files of ids, but {name} has records; name their field with --tokens_field"
        )
    files = sources.files_of(name, suffixes, (".npy",) if form == "npy" else (".bin",))
    for file in files:
        if not sources.is_plain(file):
            raise UserError(f"{file} has records and is not a file of ids; name their field with --tokens_field")
        token_files.check(file, form)
    source = sources.source_of_files(name, files, "", lambda file: token_files.records(file, form, ids))
    # A file of Megatron-LM has documents; others are one stream, in which document tokens separate them.
    return _mapped(source, ids.documents_of_each if form == "megatron" else functools.partial(ids.split, name))


def _of_field(name: str, ids: Ids, field: str, suffixes: tuple[str, ...] | None) -> Source:
    def record(origin: str, fields: Any) -> Record:
        missing = without_field(origin, fields, field, "tokens_field")
        return ids.record(origin, fields[field], field) if missing is None else missing

    if name.startswith("hf:"):
        sources.refuse_unread(name, suffixes=suffixes)
        return sources.open_dataset(name, record)
    files = sources.files_of(name, suffixes, sources.RECORD_SUFFIXES)
    for file in files:
        if sources.is_plain(file):
            raise UserError(
                f"{file} is not JSONL or Parquet and has no records; give the format of its ids with --token_files"
            )

    def records(file: pathlib.Path) -> Iterator[Record]:
        if stripped_suffix(file) == ".parquet":
            return parquet.id_records(file, field, ids)
        return sources.json_lines(file, record)

    return sources.source_of_files(name, files, field, records)


def _mapped(source: Source, documents: Callable[[Iterable[Record]], Iterator[Record]]) -> Source:
    """``source`` with other records, made from its own. A source whose beginning is broken is still refused."""
    return dataclasses.replace(source, records=lambda: documents(iter(source)))
