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

from jaxlinear.data.sources import Record, open_source
from jaxlinear.errors import UserError


def texts(source) -> list[str]:
    return [record.text for record in source if record.text is not None]


def errors(source) -> list[tuple[str, str]]:
    return [(record.origin, record.error) for record in source if record.error is not None]


def json_lines(*values) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_python_stdlib():
    records = list(open_source("python-stdlib"))
    origins = [record.origin for record in records]
    assert len(records) > 500 and not any("site-packages" in origin for origin in origins)
    assert any(origin.endswith("asyncio/queues.py") for origin in origins)
    by_name = {record.origin.rsplit("/", 1)[-1]: record.text for record in records}
    assert by_name["this.py"].startswith('s = """Gur Mra bs Clguba')
    assert len(errors(records)) < 0.01 * len(records)


def test_one_text_file_is_one_document(tmp_path):
    (tmp_path / "a.log").write_bytes("é\r\nb\n\n".encode())
    assert texts(open_source(str(tmp_path / "a.log"))) == ["é\r\nb\n\n"]


def test_separator_cuts_text_into_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n\nfour\n")
    records = list(open_source(str(tmp_path / "a.txt"), separator="\n\n"))
    file = tmp_path / "a.txt"
    assert records == [
        Record(f"{file}:1", "one\ntwo"),
        Record(f"{file}:4", "three"),
        Record(f"{file}:6", "four\n"),
    ]


def test_separators_are_found_wherever_chunks_end(tmp_path, monkeypatch):
    text = "one--two----three-- - -four-"
    (tmp_path / "a.txt").write_text(text)
    for size in range(1, 8):
        monkeypatch.setattr("jaxlinear.data.compressed._CHUNK", size)
        assert texts(open_source(str(tmp_path / "a.txt"), separator="--")) == text.split("--")


def test_a_separator_that_cuts_nothing_is_refused(tmp_path, caplog):
    """For example, a mistyped one. A separator that cuts only some files is accepted, and the uncut files are counted."""
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "empty.txt").write_text("")
    refused = r"^document_separator '{}' is nowhere in {}, in 2 plain-text files; {}$"
    with pytest.raises(UserError, match=refused.format(r"\\n-\\n", tmp_path, "leave it out if each is one document")):
        list(open_source(str(tmp_path), separator="\n-\n"))
    with pytest.raises(UserError, match=refused.format(r"\\r\\n\\r\\n", tmp_path, r"'\\n\\n' is in 1 of them")):
        list(open_source(str(tmp_path), separator="\r\n\r\n"))
    assert caplog.messages == []
    with caplog.at_level("INFO", logger="jaxlinear"):
        source = open_source(str(tmp_path), separator="\n\n")
        assert texts(source) == texts(source) == ["one", "two", "three", ""]
        (tmp_path / "b.txt").write_bytes(b"three\r\n\r\nfour")
        list(open_source(str(tmp_path), separator="\n\n"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=rf"nowhere in {tmp_path}; '\\r\\n\\r\\n' is in 1 of them$"):
        list(open_source(str(tmp_path), separator="\n\n"))
    said = f"{tmp_path}: 1 plain-text files are cut at '\\n\\n'; 1 files without it are one document each"
    assert caplog.messages == [said, said + r" ('\r\n\r\n' is in 1 of them)"]


def test_a_separator_that_cuts_nothing_is_said_early(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("jaxlinear.data.sources._ACCEPTABLE_UNCUT_AT_START", 3)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"one{'|' * (i == 4)}")
    assert len(texts(open_source(str(tmp_path), separator="|"))) == 6
    assert caplog.messages == [f"document_separator '|' is nowhere in the first 3 plain-text files of {tmp_path}"]


def test_bad_separators_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match="document_separator must not be empty"):
        open_source(str(tmp_path), separator="")
    with pytest.raises(UserError, match=r"document_separator '\\udcff' is not Unicode text"):
        open_source(str(tmp_path), separator="\udcff")


def test_folder_is_read_recursively_in_order_by_suffix(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "b" / "a.md").write_text("a")
    (tmp_path / "b" / "c.jsonl").write_bytes(json_lines({"text": "c1"}, {"text": "c2"}))
    (tmp_path / "b" / "d.txt.gz").write_bytes(gzip.compress(b"d"))
    (tmp_path / "b" / "e.bin").write_bytes(b"e")
    (tmp_path / ".hidden" / "f.txt").write_text("f")
    (tmp_path / ".draft.txt").write_text("draft")
    assert texts(open_source(str(tmp_path))) == ["a", "c1", "c2", "d", "z"]
    assert texts(open_source(str(tmp_path), suffixes=(".bin",))) == ["e"]


def test_what_is_left_out_of_a_folder_is_said(tmp_path, caplog):
    names = ["a.txt", "b.txt", "a.xz", "b.txt.xz", "noise", *(f"c.{i}" for i in range(4)), ".hidden"]
    for name in names[:2]:
        (tmp_path / name).write_text(name)
    with caplog.at_level("INFO", logger="jaxlinear"):
        open_source(str(tmp_path))
        assert caplog.messages == []
        for name in names[2:]:
            (tmp_path / name).write_text(name)
        assert texts(open_source(str(tmp_path))) == ["a.txt", "b.txt"]
    assert caplog.messages == [
        f"{tmp_path}: reading 2 files, leaving out 2 .xz, 1 .0, 1 .1, 1 .2, 1 .3, ... (--suffixes chooses them)"
    ]


def test_links_in_a_folder_are_followed_and_nothing_is_read_twice(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder / "b", elsewhere / "deep"):
        path.mkdir(parents=True)
    (folder / "b" / "a.txt").write_text("a")
    (elsewhere / "deep" / "c.txt").write_text("c")
    (elsewhere / "blob").write_text("d")
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
    (tmp_path / "a.txt").write_text("a")
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("b.txt")
    (tmp_path / "d.txt").write_text("a")  # a copy is a separate file
    with caplog.at_level("INFO", logger="jaxlinear"):
        assert [record.origin for record in open_source(str(tmp_path))] == [f"{tmp_path}/{name}.txt" for name in "ad"]
    assert caplog.messages == [
        f"{tmp_path}: leaving out 2 duplicate names of the same files: {tmp_path}/b.txt is {tmp_path}/a.txt, "
        f"{tmp_path}/c.txt is {tmp_path}/a.txt"
    ]


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, name):
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "program.js").symlink_to("gone")  # not a file that is read
    assert texts(open_source(str(tmp_path))) == ["z"]
    (tmp_path / name).symlink_to("gone")
    with pytest.raises(
        UserError, match=f"^{tmp_path}/{name} is a link to gone, which does not exist; fix or remove it$"
    ):
        open_source(str(tmp_path))


def test_a_pipe_in_a_folder_is_refused(tmp_path):
    """Reading it would wait forever."""
    (tmp_path / "a.txt").write_text("one")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(UserError, match=rf"^{tmp_path}/b\.txt is a pipe, a socket or a device, not a file"):
        open_source(str(tmp_path))


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """The refusal is simulated, since tests may run as root, to whom permissions do not apply."""
    (tmp_path / "z.txt").write_text("z")
    closed = tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"^{closed} cannot be read \(Permission denied\), and its text would be left"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.ndjson"])
def test_json_lines(tmp_path, name):
    content = json_lines({"text": "one\ntwo", "id": 1}, {"text": "日本"}) + b"\n" + b'{"text": "no line end"}'
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get("." + name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(content))
    source = open_source(str(tmp_path / name))
    assert texts(source) == ["one\ntwo", "日本", "no line end"]
    assert texts(source) == ["one\ntwo", "日本", "no line end"]  # a second pass gives the same texts


def test_a_mark_of_the_byte_order_is_no_part_of_json(tmp_path):
    """Nor is it a broken record. In plain text, which is taken byte for byte, the mark stays."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines({"text": "one"}, {"text": "two"}))
    assert texts(open_source(str(tmp_path / "a.jsonl"))) == ["one", "two"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts(open_source(str(tmp_path / "a.txt"))) == ["\ufeffone\r\ntwo"]


def test_lines_longer_than_a_chunk(tmp_path):
    values = [{"text": "a" * 3_000_000}, {"text": "b"}, {"text": "c" * 1_500_000}]
    (tmp_path / "a.jsonl").write_bytes(json_lines(*values))
    assert texts(open_source(str(tmp_path / "a.jsonl"))) == [value["text"] for value in values]


def test_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"body": "b", "text": "t"}))
    assert texts(open_source(str(tmp_path / "a.jsonl"), text_field="body")) == ["b"]


def test_broken_json_lines_are_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        json_lines({"text": "good"})
        + b'{"text": \n'
        + json_lines({"id": 2}, {"text": 3}, [1], {"text": "\ud800"})
        + b'{"text": "\xff"}\n'
    )
    assert errors(open_source(str(file))) == [
        (f"{file}:2", "not JSON with one object per line: Expecting value: line 1 column 10 (char 9)"),
        (f"{file}:3", "no field 'text' (its fields: id); --text_field chooses it"),
        (f"{file}:4", "field 'text' is not a string but int"),
        (f"{file}:5", "a JSON list where an object is expected"),
        (f"{file}:6", "field 'text' is not Unicode text: surrogates not allowed"),
        (f"{file}:7", "not utf-8: invalid start byte at byte 10"),
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_file_is_a_broken_record(tmp_path, suffix):
    content = json_lines(*({"text": f"{i} " + "".join(map(chr, range(300, 900)))} for i in range(50)))
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    file = tmp_path / f"a.jsonl{suffix}"
    packed = pack(content)
    file.write_bytes(packed[: len(packed) - 5])
    (tmp_path / "b.jsonl").write_bytes(json_lines({"text": "after"}))
    source = open_source(str(tmp_path))
    ((origin, error),) = errors(source)
    assert origin.startswith(f"{file}:") and error == f"damaged {suffix} file: it is truncated"
    assert texts(source)[-1] == "after"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_of_a_truncated_text_whole_documents_are_read(tmp_path, suffix):
    """As with JSON lines. A document that is cut off in the middle is not read."""
    documents = [f"{i}\n" + "".join(map(chr, range(300, 900))) for i in range(500)]
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    file = tmp_path / f"a.txt{suffix}"
    packed = pack("\n--\n".join(documents).encode())
    file.write_bytes(packed[: len(packed) * 2 // 3])
    (tmp_path / "b.txt").write_text("after")
    records = list(open_source(str(tmp_path), separator="\n--\n"))
    read = [record.text for record in records if record.text is not None][:-1]
    assert len(read) > 100 and read == documents[: len(read)]
    (damaged,) = [record for record in records if record.text is None]
    assert damaged == Record(f"{file}:{1 + 3 * len(read)}", None, f"damaged {suffix} file: it is truncated", True)


def test_one_bad_byte_costs_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one|two \xff|three\n|four")
    source = open_source(str(tmp_path), separator="|")
    assert texts(source) == ["one", "three\n", "four"]
    assert errors(source) == [(f"{tmp_path}/a.txt:1", "not utf-8: invalid start byte at byte 4")]


def test_what_is_behind_the_beginning_of_something_binary_is_no_text(tmp_path):
    """For example, in an archive, which holds pieces of text."""
    (tmp_path / "a.txt").write_bytes(b"one|two\0|three|four")
    records = list(open_source(str(tmp_path), separator="|"))
    error = Record(
        f"{tmp_path}/a.txt:1", None, "a binary file (it has NUL bytes); --token_files reads token ids", ends_file=True
    )
    assert records == [Record(f"{tmp_path}/a.txt:1", "one"), error]


@pytest.mark.parametrize("separator", [None, "\n"])
def test_utf16_is_named(tmp_path, separator):
    (tmp_path / "a.txt").write_bytes("one\ntwo".encode("utf-16"))
    with pytest.raises(
        UserError,
        match=r"UTF-16 by its first bytes; convert it to UTF-8, for example with iconv "
        r"-f UTF-16 -t UTF-8$",
    ):
        list(open_source(str(tmp_path), separator=separator))


def test_the_size_of_a_source_is_that_of_its_content(tmp_path):
    """Also with several members, and for files whose beginning is damaged."""
    text = "".join(f"{i} and so on. " for i in range(200_000)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.gz").write_bytes(
        b"".join(gzip.compress(text[i : i + 50_000]) for i in range(0, len(text), 50_000))
    )
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "d.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(text))
    assert open_source(str(tmp_path)).size == pytest.approx(4 * len(text), rel=0.1)
    (tmp_path / "d.txt.zst").write_bytes(b"this is not compressed at all")
    assert open_source(str(tmp_path)).size == pytest.approx(3 * len(text), rel=0.1)
    (tmp_path / "d.txt.zst").write_bytes(b"")
    assert open_source(str(tmp_path)).size == pytest.approx(3 * len(text), rel=0.1)


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


def test_binary_and_other_encodings_among_text(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "c.txt").write_bytes("é".encode("latin-1"))
    assert errors(open_source(str(tmp_path))) == [
        (str(tmp_path / "b.txt"), "a binary file (it has NUL bytes); --token_files reads token ids"),
        (str(tmp_path / "c.txt"), "not utf-8: unexpected end of data at byte 0"),
    ]


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
    with pytest.raises(UserError, match="hf:absent cannot be loaded: Dataset 'absent' doesn't exist"):
        open_source("hf:absent")
    with pytest.raises(UserError, match="hf:script cannot be loaded: Dataset scripts are no longer supported"):
        open_source("hf:script")
    with pytest.raises(UserError, match=r"^'hf:' does not name a dataset; write hf:NAME or hf:NAME:CONFIG$"):
        open_source("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:name needs the datasets package: pip install jaxlinear\[hf\]"):
        open_source("hf:name")


@pytest.mark.parametrize(
    "name, separator, remedy",
    [
        ("a.txt", None, "--document_separator cuts it"),
        ("a.txt", "|", "is document_separator '|' correct?"),
        ("a.jsonl", None, "JSONL has one object per line"),
    ],
)
def test_a_document_larger_than_memory_is_refused(tmp_path, monkeypatch, name, separator, remedy):
    """A corpus in one file that is cut differently from what was given, or a JSON array in one line."""
    monkeypatch.setattr("jaxlinear.data.sources._LARGEST_DOCUMENT", 100)
    monkeypatch.setattr("jaxlinear.data.compressed._CHUNK", 40)
    with pytest.raises(
        UserError, match=f"^{tmp_path}/{name} has a document of more than 100 bytes; {re.escape(remedy)}$"
    ):
        (tmp_path / name).write_bytes(json_lines({"text": "short"}) + b"|" + 150 * b"x")
        texts(open_source(str(tmp_path / name), separator=separator))
    (tmp_path / name).write_bytes(json_lines({"text": "a"}) + b"|" + json_lines({"text": "b"}).strip(b"|"))
    assert texts(open_source(str(tmp_path / name), separator=separator))


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no source 'nowhere': there is no such file or folder"):
        open_source("nowhere")
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty: it has no documents"):
        list(open_source(str(tmp_path / "empty.jsonl")))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(UserError, match=r"no usable document .*image\.png: a binary file \(it has NUL bytes\)"):
        list(open_source(str(tmp_path / "image.png")))
    (tmp_path / "field.jsonl").write_bytes(json_lines(*[{"body": "b", "id": 1}] * 200))
    message = r"among the first 100 of .*field\.jsonl:1: no field 'text' \(its fields: body, id\); --text_field chooses"
    with pytest.raises(UserError, match=message):
        list(open_source(str(tmp_path / "field.jsonl")))


def test_options_that_nothing_of_the_source_reads_are_refused(tmp_path):
    """In a folder, one file that reads them is enough."""
    refused = r"^{} does nothing for .*: it is for {}; leave it out$"
    records, plain, folder = r"records of JSONL, Parquet or Hugging Face", "plain text", "a folder"
    (tmp_path / "a.txt").write_text("a|b")
    for name in (str(tmp_path / "a.txt"), str(tmp_path), "python-stdlib"):
        with pytest.raises(UserError, match=refused.format("text_field", records)):
            open_source(name, text_field="text")
    (tmp_path / "b.jsonl").write_bytes(json_lines({"body": "c|d"}))
    assert texts(open_source(str(tmp_path), text_field="body", separator="|")) == ["a", "b", "c|d"]
    (tmp_path / "a.txt").unlink()
    for name in (str(tmp_path / "b.jsonl"), str(tmp_path), "hf:name", "python-stdlib"):
        with pytest.raises(UserError, match=refused.format("document_separator", plain)):
            open_source(name, separator="|")
    for name in (str(tmp_path / "b.jsonl"), "hf:name", "python-stdlib"):
        with pytest.raises(UserError, match=refused.format("suffixes", folder)):
            open_source(name, suffixes=(".txt",))


def test_folders_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no file with a suffix of \.txt, .* and no other"):
        open_source(str(tmp_path))
    (tmp_path / "a.rs").write_text("a")
    with pytest.raises(UserError, match=r"^suffixes is empty; name some, such as \.txt, or leave it out$"):
        open_source(str(tmp_path), suffixes=("",))
    with pytest.raises(UserError, match=r"has no file with a suffix of .*; it has \.rs \(--suffixes chooses them\)"):
        open_source(str(tmp_path))
