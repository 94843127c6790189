"""Documents in Parquet files, read by row groups."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxlinear.data.records import Record, field_record
from jaxlinear.data.token_ids import Ids
from jaxlinear.errors import UserError

_ROWS = 1024


def expansion(file: pathlib.Path, field: str) -> float:
    """How many times the size of the file its text is, according to the file's metadata; 1 if that does not say."""
    try:
        pyarrow = _pyarrow(file)
    except UserError:  # reported when the records are read, as is damage
        return 1.0
    try:
        table = pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError):
        return 1.0
    groups = [table.row_group(i) for i in range(table.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    # For a column of lists, the path includes the list's elements, as in input_ids.list.element.
    of_field = (column for column in columns if f"{column.path_in_schema}.".startswith(f"{field}."))
    size = sum(column.total_uncompressed_size for column in of_field)
    return size / file.stat().st_size if size else 1.0


def records(file: pathlib.Path, text_field: str) -> Iterator[Record]:
    """One record per row, named file:row, counting from 1."""
    pyarrow = _pyarrow(file)

    def check(kind: Any) -> str | None:
        values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind  # a pandas categorical
        is_text = values in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())
        return None if is_text else f"not a string but {kind}"

    # As bytes, so that a text that is not UTF-8 spoils its row only and not the batch.
    def contents(column: Any) -> list[bytes | None]:
        return column.cast(pyarrow.large_binary()).to_pylist()

    def record(origin: str, content: bytes | None, field: str) -> Record:
        if content is None:
            return field_record(origin, {field: None}, field)
        try:
            return Record(origin, content.decode())
        except UnicodeDecodeError as error:
            return Record(origin, None, f"not utf-8: {error.reason} at byte {error.start}")

    return _records(file, text_field, "text_field", check, contents, record)


def id_records(file: pathlib.Path, tokens_field: str, ids: Ids) -> Iterator[Record]:
    """The same for a column of lists of token ids."""
    types = _pyarrow(file).types

    def check(kind: Any) -> str | None:
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return None if is_list and types.is_integer(kind.value_type) else f"not lists of integers but {kind}"

    def arrays(column: Any) -> list[Any]:
        return [row.values for row in column]

    def record(origin: str, values: Any, field: str) -> Record:
        if values is None or values.null_count:
            return Record(origin, None, f"field {field!r} is null or has a null id")
        return ids.record(origin, values.to_numpy(zero_copy_only=False), field)

    return _records(file, tokens_field, "tokens_field", check, arrays, record)


def _pyarrow(file: pathlib.Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file} needs the pyarrow package: pip install jaxlinear[parquet]") from error
    return pyarrow


def _records(
    file: pathlib.Path,
    field: str,
    option: str,
    check: Callable[[Any], str | None],
    values: Callable[[Any], list[Any]],
    record: Callable[[str, Any, str], Record],
) -> Iterator[Record]:
    """``record(origin, value, field)`` for the ``values`` of each batch's column, whose type must pass ``check``."""
    pyarrow = _pyarrow(file)
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                there = ", ".join(names)
                raise UserError(f"{file} has no field {field!r} (its fields: {there}); --{option} chooses it")
            if wrong := check(table.schema_arrow.field(field).type):
                raise UserError(f"field {field!r} of {file} is {wrong}")
            for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
                for value in values(batch.column(0)):
                    row += 1
                    yield record(f"{file}:{row}", value, field)
    except (pyarrow.ArrowException, OSError) as error:  # OSError is how pyarrow reports a damaged page
        if isinstance(error, OSError) and error.errno is not None:  # a disk error: no permission, or the file is gone
            raise
        yield Record(f"{file}:{row + 1}", None, f"damaged Parquet file: {error}", ends_file=True)
