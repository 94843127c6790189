"""Parquet as a source: the types of text, the amount of it, and files that cannot be read."""

import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxlinear.data.sources import open_source
from tests.data.test_sources import errors, refused, texts


def write(file, **columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=500)


def test_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    column = pyarrow.array([b"one", None, b"zwei", b"\xff"] * 525).view(pyarrow.string())
    write(file, body=column, n=range(2100))
    source = open_source(str(file), text_field="body")
    assert texts(source) == ["one", "zwei"] * 525
    null, not_utf8, *_, last = errors(source)
    assert null == (f"{file}:2", "field 'body' is not a string but NoneType")
    assert not_utf8 == (f"{file}:4", "not utf-8: invalid start byte at byte 0")
    assert last[0] == f"{file}:2100"


def test_the_size_of_parquet_is_that_of_the_text_in_it(tmp_path):
    """The size does not include other columns, and is not the compressed one."""
    random = np.random.default_rng(0)
    values = [f"{i} " + "and so on " * 100 for i in range(1000)]
    noise = [random.bytes(500) for _ in values]
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / name, text=values, noise=noise)
    size = sum(map(len, values))
    assert open_source(str(tmp_path)).size == pytest.approx(2 * size, rel=0.05)
    assert open_source(str(tmp_path), text_field="noise").size == pytest.approx(2 * 500_000, rel=0.05)
    (tmp_path / "a.parquet").write_bytes(b"damaged")
    assert open_source(str(tmp_path)).size == 7 + (tmp_path / "b.parquet").stat().st_size


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_has_several_kinds_of_strings(tmp_path, kind):
    values = pyarrow.array(["one", "žluť", None, "one"])
    column = values.dictionary_encode() if kind == "dictionary" else values.cast(getattr(pyarrow, kind)())
    write(tmp_path / "a.parquet", text=column)
    assert str(pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").schema_arrow.field("text").type).startswith(kind)
    source = open_source(str(tmp_path / "a.parquet"))
    assert texts(source) == ["one", "žluť", "one"] and len(errors(source)) == 1


def test_parquet_that_cannot_be_read_is_no_broken_record(tmp_path):
    """It is an error, as for other missing or unreadable files: otherwise a whole file would count as one record."""
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / name, text=["one"] * 200)
    source = open_source(str(tmp_path))
    assert len(texts(source)) == 400
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.parquet"):
        texts(source)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    ((origin, error),) = errors(source)
    assert origin == f"{tmp_path / 'b.parquet'}:1" and error.startswith("damaged Parquet file: ")


def test_parquet_refusals(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    write(file, body=["a"], n=[1])
    refused(r"no field 'text' \(its fields: body, n\); --text_field", file)
    refused(r"field 'n' of .* is not a string but int64", file, text_field="n")
    file.write_bytes(file.read_bytes()[:-10])
    refused(r"first 1 of .*a\.parquet:1: damaged Parquet file", file, text_field="body")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"pip install jaxlinear\[parquet\]", file)
