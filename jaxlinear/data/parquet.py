"""Documents in Parquet files, read by row groups."""

import pathlib
from collections.abc import Iterator

from jaxlinear.data.sources import Record, field_record
from jaxlinear.errors import UserError

_ROWS = 1024


def expansion(file: pathlib.Path, text_field: str) -> float:
    """How many times the bytes of the file its text is, by its own account; 1 where it gives none."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:  # which the reading of the records says, as it does of damage
        return 1.0
    try:
        table = pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError):
        return 1.0
    groups = [table.row_group(i) for i in range(table.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_field)
    return size / file.stat().st_size if size else 1.0


def records(file: pathlib.Path, text_field: str) -> Iterator[Record]:
    """One record a row; a row is named file:row, the first row is 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file} needs the pyarrow package: pip install jaxlinear[parquet]") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                there = ", ".join(names)
                raise UserError(f"{file} has no field {text_field!r} (its fields: {there}); --text_field chooses")
            kind = table.schema_arrow.field(text_field).type
            values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind  # a categorical, as pandas calls it
            if values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise UserError(f"field {text_field!r} of {file} is not a string but {kind}")
            for batch in table.iter_batches(batch_size=_ROWS, columns=[text_field]):
                # As bytes, so that a text that is not UTF-8 spoils its row and not the batch.
                for content in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    yield _record(f"{file}:{row}", content, text_field)
    except (pyarrow.ArrowException, OSError) as error:  # OSError is how pyarrow reports a damaged page
        if isinstance(error, OSError) and error.errno is not None:  # of the disk: no permission, or the file is gone
            raise
        yield Record(f"{file}:{row + 1}", None, f"damaged Parquet file: {error}", ends_file=True)


def _record(origin: str, content: bytes | None, text_field: str) -> Record:
    if content is None:
        return field_record(origin, {text_field: None}, text_field)
    try:
        return Record(origin, content.decode())
    except UnicodeDecodeError as error:
        return Record(origin, None, f"not utf-8: {error.reason} at byte {error.start}")
