"""Every kind of source; broken records are named, and bad sources refused in one line."""

import errno
import gzip
import json
import os
import re
import sys
import types

import pytest
import zstandard

from jaxlinear.data.records import Record
from jaxlinear.data.sources import open_source
from jaxlinear.errors import UserError


def texts(source) -> list[str]:
    return [record.text for record in source if record.text is not None]


def errors(source) -> list[tuple[str, str]]:
    return [(record.origin, record.error) for record in source if record.error is not None]


def json_lines(*values) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def opened(path, content=None, **options):
    """The source ``path``, after writing this content to it."""
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_source(str(path), **options)


def refused(key, name, **options) -> None:
    with pytest.raises(UserError, match=key):
        list(open_source(str(name), **options))


PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def test_python_stdlib():
    records = list(open_source("python-stdlib"))
    origins = [record.origin for record in records]
    assert len(records) > 500 and not any("site-packages" in origin for origin in origins)
    assert any(origin.endswith("asyncio/queues.py") for origin in origins)
    by_name = {record.origin.rsplit("/", 1)[-1]: record.text for record in records}
    assert by_name["this.py"].startswith('s = """Gur Mra bs Clguba')
    assert len(errors(records)) < 0.01 * len(records)


def test_separator_splits_text_into_documents(tmp_path):
    """Without one, a file is one document, byte for byte: with its ends of lines, and with a mark of the byte order."""
    file = tmp_path / "a.log"
    assert texts(opened(file, "\ufeffé\r\nb\n\n")) == ["\ufeffé\r\nb\n\n"]
    records = list(opened(file, "one\ntwo\n\nthree\n\nfour\n", separator="\n\n"))
    assert records == [Record(f"{file}:{at}", text) for at, text in ((1, "one\ntwo"), (4, "three"), (6, "four\n"))]


def test_separators_are_found_wherever_chunks_end(tmp_path, monkeypatch):
    text = "one--two----three-- - -four-"
    for size in range(1, 8):
        monkeypatch.setattr("jaxlinear.data.compressed._CHUNK", size)
        assert texts(opened(tmp_path / "a.txt", text, separator="--")) == text.split("--")


def test_a_separator_that_cuts_nothing_is_refused(tmp_path, caplog):
    """For example, a mistyped one. A separator that cuts only some files is accepted, and the uncut files are counted."""
    tree(tmp_path, {"a.txt": "one\n\ntwo", "b.txt": "three", "empty.txt": ""})
    nowhere = "is nowhere in {}, in 2 plain-text files; {}"
    refused(nowhere.format(tmp_path, "leave it out"), tmp_path, separator="\n-\n")
    refused(nowhere.format(tmp_path, r"'\\n\\n' is in 1 of them"), tmp_path, separator="\r\n\r\n")
    assert caplog.messages == []
    with caplog.at_level("INFO", logger="jaxlinear"):
        source = open_source(str(tmp_path), separator="\n\n")
        assert texts(source) == texts(source) == ["one", "two", "three", ""]
        (tmp_path / "b.txt").write_bytes(b"three\r\n\r\nfour")
        list(open_source(str(tmp_path), separator="\n\n"))
    (tmp_path / "a.txt").unlink()
    refused(rf"nowhere in {tmp_path}; '\\r\\n\\r\\n' is in 1 of them$", tmp_path, separator="\n\n")
    said = f"{tmp_path}: 1 plain-text files are cut at '\\n\\n'; 1 files without it are one document each"
    assert caplog.messages == [said, said + r" ('\r\n\r\n' is in 1 of them)"]


def test_a_separator_that_cuts_nothing_is_said_early(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("jaxlinear.data.sources._ACCEPTABLE_UNSPLIT_AT_START", 3)
    tree(tmp_path, {f"{i}.txt": f"one{'|' * (i == 4)}" for i in range(5)})
    assert len(texts(open_source(str(tmp_path), separator="|"))) == 6
    assert caplog.messages == [f"document_separator '|' is nowhere in the first 3 plain-text files of {tmp_path}"]


def tree(folder, contents) -> None:
    """Files by name."""
    for name, content in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def test_folder_is_read_recursively_in_order_by_suffix(tmp_path):
    tree(tmp_path, {"z.txt": "z", "b/a.md": "a", "b/c.jsonl": json_lines({"text": "c1"}, {"text": "c2"})})
    tree(tmp_path, {"b/d.txt.gz": gzip.compress(b"d"), "b/e.bin": "e", ".hidden/f.txt": "f", ".draft.txt": "draft"})
    assert texts(open_source(str(tmp_path))) == ["a", "c1", "c2", "d", "z"]
    assert texts(open_source(str(tmp_path), suffixes=(".bin",))) == ["e"]
    tree(tmp_path, {"c/a.rs": "a"})
    refused(r"no file with a suffix of .*; it has \.rs \(--suffixes", tmp_path / "c")


def test_what_is_left_out_of_a_folder_is_said(tmp_path, caplog):
    tree(tmp_path, {"a.txt": "a", "b.txt": "b"})
    with caplog.at_level("INFO", logger="jaxlinear"):
        open_source(str(tmp_path))
        assert caplog.messages == []
        tree(tmp_path, dict.fromkeys(("a.xz", "b.txt.xz", "noise", *(f"c.{i}" for i in range(4)), ".hidden"), ""))
        assert texts(open_source(str(tmp_path))) == ["a", "b"]
    assert caplog.messages == [
        f"{tmp_path}: reading 2 files, leaving out 2 .xz, 1 .0, 1 .1, 1 .2, 1 .3, ... (--suffixes chooses them)"
    ]


def test_links_in_a_folder_are_followed_and_nothing_is_read_twice(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    tree(tmp_path, {"folder/b/a.txt": "a", "elsewhere/deep/c.txt": "c", "elsewhere/blob": "d"})
    (folder / "linked").symlink_to(elsewhere)
    (folder / "d.txt").symlink_to(elsewhere / "blob")
    assert texts(open_source(str(folder))) == ["a", "d", "c"]
    (folder / "e.txt").symlink_to(elsewhere / "blob")
    (folder / "again").symlink_to(elsewhere / "deep")
    (folder / "b" / "loop").symlink_to(folder)
    (elsewhere / "deep" / "back").symlink_to(elsewhere)
    records = list(open_source(str(folder)))
    assert [record.origin for record in records] == [f"{folder}/{name}" for name in ("again/c.txt", "b/a.txt", "d.txt")]
    (tmp_path / "other").symlink_to(folder)
    assert texts(open_source(str(tmp_path / "other"))) == ["c", "a", "d"]


def test_of_hard_links_one_is_read(tmp_path, caplog):
    tree(tmp_path, {"a.txt": "a", "d.txt": "a"})  # a copy is a separate file
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("b.txt")
    with caplog.at_level("INFO", logger="jaxlinear"):
        assert [record.origin for record in open_source(str(tmp_path))] == [f"{tmp_path}/{name}.txt" for name in "ad"]
    assert caplog.messages == [
        f"{tmp_path}: leaving out 2 duplicate names of the same files: {tmp_path}/b.txt is {tmp_path}/a.txt, "
        f"{tmp_path}/c.txt is {tmp_path}/a.txt"
    ]


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_a_link_that_leads_nowhere_and_a_pipe_are_refused(tmp_path, name):
    """Reading a pipe would wait forever."""
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "program.js").symlink_to("gone")  # not a file that is read
    assert texts(open_source(str(tmp_path))) == ["z"]
    (tmp_path / name).symlink_to("gone")
    refused(f"{tmp_path}/{name} is a link to gone, which does not exist", tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "b.txt")
    refused(rf"{tmp_path}/b\.txt is a pipe", tmp_path)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """The refusal is simulated, since tests may run as root, to whom permissions do not apply."""
    error = PermissionError(errno.EACCES, "Permission denied", "closed")
    monkeypatch.setattr(os, "walk", lambda folder, onerror, followlinks: onerror(error))
    refused(r"closed cannot be read \(Permission denied\)", tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.ndjson"])
def test_json_lines(tmp_path, name):
    """A mark of the byte order is no part of them, and a line may be longer than a chunk."""
    content = json_lines({"text": "one\ntwo", "id": 1}, {"text": "日本"}, {"text": "a" * 3_000_000}, {"text": "b"})
    content = b"\xef\xbb\xbf" + content + b"\n" + b'{"text": "no line end"}'
    source = opened(tmp_path / name, PACK.get("." + name.split(".")[-1], bytes)(content))
    for _ in range(2):  # a second pass gives the same texts
        assert texts(source) == ["one\ntwo", "日本", "a" * 3_000_000, "b", "no line end"]


def test_broken_json_lines_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    values = json_lines({"id": 2}, {"text": 3}, [1], {"text": "\ud800"})
    content = json_lines({"text": "good"}) + b'{"text": \n' + values + b'{"text": "\xff"}\n'
    assert errors(opened(file, content)) == [
        (f"{file}:2", "not JSON with one object per line: Expecting value: line 1 column 10 (char 9)"),
        (f"{file}:3", "no field 'text' (its fields: id); --text_field chooses it"),
        (f"{file}:4", "field 'text' is not a string but int"),
        (f"{file}:5", "a JSON list where an object is expected"),
        (f"{file}:6", "field 'text' is not Unicode text: surrogates not allowed"),
        (f"{file}:7", "not utf-8: invalid start byte at byte 10"),
    ]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_of_a_truncated_file_whole_documents_are_read(tmp_path, kind, suffix):
    """A document that is truncated in the middle is not read; what is lost is a broken record."""
    documents = [f"{i}\n" + "".join(map(chr, range(300, 900))) for i in range(500)]
    file = tmp_path / f"a.{kind}{suffix}"
    as_json = json_lines(*({"text": text} for text in documents))
    packed = PACK[suffix](as_json if kind == "jsonl" else "\n--\n".join(documents).encode())
    file.write_bytes(packed[: len(packed) * 2 // 3])
    (tmp_path / "b.txt").write_text("after\n--\nit")
    records = list(open_source(str(tmp_path), separator="\n--\n"))
    *read, after, it = [record.text for record in records if record.text is not None]
    assert (after, it) == ("after", "it") and len(read) > 100 and read == documents[: len(read)]
    (damaged,) = [record for record in records if record.text is None]
    line = 1 + (3 if kind == "txt" else 1) * len(read)
    assert damaged == Record(f"{file}:{line}", None, f"damaged {suffix} file: it is truncated", True)


def test_one_bad_byte_costs_one_document(tmp_path):
    """But what is behind the beginning of something binary is no text, such as an archive with pieces of it."""
    source = opened(tmp_path / "a.txt", b"one|two \xff|three\n|four", separator="|")
    assert texts(source) == ["one", "three\n", "four"]
    assert errors(source) == [(f"{tmp_path}/a.txt:1", "not utf-8: invalid start byte at byte 4")]
    one, binary = list(opened(tmp_path / "a.txt", b"one|two\0|three|four", separator="|"))
    assert one.text == "one" and binary.ends_file and "a binary file (it has NUL bytes)" in binary.error


def test_the_size_of_a_source_is_that_of_its_content(tmp_path):
    """Also with several members, and for files whose beginning is damaged."""
    text = "".join(f"{i} and so on. " for i in range(200_000)).encode()
    members = (gzip.compress(text[i : i + 50_000]) for i in range(0, len(text), 50_000))
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.gz").write_bytes(b"".join(members))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(text))
    for content, times in ((PACK[".zst"](text), 4), (b"this is not compressed at all", 3), (b"", 3)):
        (tmp_path / "d.txt.zst").write_bytes(content)
        assert open_source(str(tmp_path)).size == pytest.approx(times * len(text), rel=0.1)


def test_the_size_of_jsonl_is_that_of_the_text_in_it(tmp_path):
    """Otherwise, if other fields make up nine tenths of the lines, a tokenizer is trained on a tenth of the intended
    text."""
    values = [{"text": "ö" * (50 + i % 7), "meta": {"html": "x" * 2000}} for i in range(1000)]
    size = sum(len(value["text"].encode()) for value in values)
    content = "\n".join(map(json.dumps, values)).encode()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))  # another kind, compressed in the same way
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl").write_bytes(b"damaged\n" + content)
    assert open_source(str(tmp_path)).size == pytest.approx(2 * size, rel=0.1)
    (tmp_path / "c.jsonl").write_bytes(b"damaged\n[1]\n3\n{}")
    assert open_source(str(tmp_path)).size == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("separator, at", [(None, ""), ("\n", ":1")])
def test_binary_and_other_encodings_among_text(tmp_path, separator, at):
    tree(tmp_path, {"a.txt": "go\nod", "b.txt": b"\x7fELF\0\0", "c.txt": "é".encode("latin-1")})
    tree(tmp_path, {"d.txt": "one\ntwo".encode("utf-16")})
    found = dict(errors(open_source(str(tmp_path), separator=separator)))
    assert found.pop(f"{tmp_path}/d.txt{at}").endswith("with iconv -f UTF-16 -t UTF-8")
    assert found == {
        f"{tmp_path}/b.txt{at}": "a binary file (it has NUL bytes); --token_files reads token ids",
        f"{tmp_path}/c.txt{at}": "not utf-8: unexpected end of data at byte 0",
    }


def test_hugging_face(monkeypatch):
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    calls = []

    def load_dataset(path, config, split):
        calls.append((path, config, split))
        if path == "absent":
            raise FileNotFoundError("Dataset 'absent' doesn't exist")
        if path == "script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = open_source("hf:org/name:small")
    assert texts(source) == ["one", "two"]
    assert errors(source) == [("hf:org/name:small:2", "field 'text' is not a string but NoneType")]
    assert calls == [("org/name", "small", "train")]
    refused("hf:absent cannot be loaded: Dataset 'absent' doesn't exist", "hf:absent")
    refused("hf:script cannot be loaded: Dataset scripts are no longer supported", "hf:script")
    refused("'hf:' does not name a dataset", "hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"pip install jaxlinear\[hf\]", "hf:name")


@pytest.mark.parametrize(
    "name, separator, remedy",
    [("a.txt", None, "--document_separator"), ("a.txt", "|", "document_separator '|'"), ("a.jsonl", None, "JSONL")],
)
def test_a_document_larger_than_memory_is_refused(tmp_path, monkeypatch, name, separator, remedy):
    """A corpus in one file that is split differently from what was given, or a JSON array in one line."""
    monkeypatch.setattr("jaxlinear.data.sources._LARGEST_DOCUMENT", 100)
    monkeypatch.setattr("jaxlinear.data.compressed._CHUNK", 40)
    (tmp_path / name).write_bytes(json_lines({"text": "short"}) + b"|" + 150 * b"x")
    refused(
        f"{tmp_path}/{name} has .* more than 100 bytes; .*{re.escape(remedy)}", tmp_path / name, separator=separator
    )
    assert texts(
        opened(tmp_path / name, json_lines({"text": "a"}) + b"|" + json_lines({"text": "b"}), separator=separator)
    )


@pytest.mark.parametrize(
    "name, content, options, key",
    [
        ("nowhere", None, {}, "no such file or folder"),
        ("a.jsonl", b"\n\n", {}, "is empty: it has no documents"),
        ("a.png", b"\x89PNG\0", {}, r"no usable document .*a\.png: a binary file"),
        ("a.jsonl", json_lines(*[{"body": "b"}] * 200), {}, r"first 100 of .*a\.jsonl:1: no field 'text' .*: body\)"),
        ("a.txt", b"one", {"separator": ""}, "must not be empty"),
        ("a.txt", b"one", {"separator": "\udcff"}, "not Unicode text"),
        ("", None, {}, r"no file with a suffix of \.txt, .* and no other"),
        ("", None, {"suffixes": ("",)}, r"suffixes is empty; .* \.txt"),
    ],
)
def test_bad_sources_are_refused(tmp_path, name, content, options, key):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(key, tmp_path / name, **options)


def test_options_that_nothing_of_the_source_reads_are_refused(tmp_path):
    """In a folder, one file that reads them is enough."""
    text, records = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("a|b")
    for name in (text, tmp_path, "python-stdlib"):
        refused("text_field does nothing .* JSONL", name, text_field="text")
    records.write_bytes(json_lines({"body": "c|d"}))
    assert texts(open_source(str(tmp_path), text_field="body", separator="|")) == ["a", "b", "c|d"]
    text.unlink()
    for name in (records, tmp_path, "hf:name", "python-stdlib"):
        refused("document_separator does nothing .* plain text", name, separator="|")
    for name in (records, "hf:name", "python-stdlib"):
        refused("suffixes does nothing .* folder", name, suffixes=(".txt",))
