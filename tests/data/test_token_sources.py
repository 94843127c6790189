"""Sources of token ids: the dataset equals the one made from their text, in every format; files that differ from what is
declared are refused."""

import gzip
import json
import re
import struct
import sys
import types

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxlinear.data import prepare, token_ids
from jaxlinear.data.records import Record
from jaxlinear.data.token_files import FLAT
from jaxlinear.data.tokenizer import BytesTokenizer, open_tokenizer, train_bpe
from jaxlinear.errors import UserError
from tests.data.sources_of_text import files, make_texts, write_jsonl
from tests.data.test_sources import tree
from tests.data.test_tokenizer import json_tokenizer

OPTIONS = {"block_length": 64, "heldout_fraction": 0.2, "workers": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(texts, a tokenizer trained on them, its file, the files of the dataset prepared from the texts)."""
    directory = tmp_path_factory.mktemp("made")
    texts = make_texts(0, 150, longest=60)
    tokenizer = train_bpe(texts, 400)
    tokenizer.save(directory)
    file = str(directory / "tokenizer.json")
    prepare(write_jsonl(directory / "text.jsonl", texts), directory / "of_text", tokenizer=file, **OPTIONS)
    return texts, tokenizer, file, dataset(directory / "of_text")


def dataset(directory) -> dict:
    """The contents of a dataset's files, without the name of the source."""
    content = files(directory)
    manifest = json.loads(content.pop("manifest.json"))
    del manifest["source"], manifest["records"]
    return {**content, "manifest": manifest}


def stream(tokenizer, texts) -> np.ndarray:
    return np.concatenate([[tokenizer.document_token, *ids] for ids in tokenizer.encode_batch(texts)])


def write_llm_c(path, ids, magic=20240520, version=1, dtype="<u2", count=None) -> str:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())
    return str(path)


def write_megatron(path, documents, code=4, dtype="<i4") -> str:
    """Each of ``documents`` is a list of its sequences."""
    sequences = [np.asarray(sequence, dtype) for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    offsets = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    borders = np.cumsum([0, *(len(document) for document in documents)]).astype("<i8")
    path.write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(sequences), len(borders))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + borders.tobytes())
    return str(path)


def write_ids(path, rows, field="input_ids") -> str:
    path.write_text("".join(json.dumps({field: [int(token) for token in row]}) + "\n" for row in rows))
    return str(path)


def of_file(kind, directory, tokenizer, texts) -> tuple[str, dict]:
    """(a source with the ids of ``texts``, the arguments of ``prepare`` for it)."""
    ids = stream(tokenizer, texts)
    rows = [list(row) for row in tokenizer.encode_batch(texts)]
    border = tokenizer.document_token
    path = directory / {"compressed": "ids.bin.gz"}.get(kind, "ids.npy" if "npy" in kind else "ids.bin")
    flat = {
        **{kind: {path.name: ids.astype(np.dtype(kind).newbyteorder("<")).tobytes()} for kind in FLAT},
        "borders behind": {path.name: np.roll(ids, -1).astype("<u2").tobytes()},
        "compressed": {path.name: gzip.compress(ids.astype("<u2").tobytes())},
        # Which begin and end within documents.
        "files of a folder": {
            f"{i}.bin": part.astype("<u2").tobytes() for i, part in enumerate(np.array_split(ids, 7))
        },
    }
    if kind in flat:
        tree(directory, flat[kind])
        return str(path if len(flat[kind]) == 1 else directory), {"token_files": kind if kind in FLAT else "uint16"}
    if "npy" in kind:
        in_rows = np.append(ids, np.full(-len(ids) % 32, border)).reshape(-1, 32)
        np.save(path, in_rows if kind == "rows of npy" else ids.astype(np.int32))
        return str(path if kind == "rows of npy" else directory), {"token_files": "npy"}
    if "llm.c" in kind:
        of_llama = (20240801, 7, "<u4") if kind == "llm.c of Llama" else ()
        return write_llm_c(path, ids, *of_llama), {"token_files": "llm.c"}
    if "megatron" in kind:
        documents, *dtype = {
            "megatron": ([[[*row, border]] for row in rows],),
            "megatron by sentences": ([[row[:1], row[1:], [border]] for row in rows], 8, "<u2"),
            # Two documents as one, as from text with the borders spelled out.
            "megatron of several": ([[[*a, border, *b, border]] for a, b in zip(rows[::2], rows[1::2], strict=True)],),
        }[kind]
        return write_megatron(path, documents, *dtype), {"token_files": "megatron"}
    arguments = {"tokens_field": "input_ids", "packed_rows": "packed" in kind}
    if kind == "hugging face":
        return "hf:org/name", arguments
    if "jsonl" in kind:
        lines = np.array_split(ids, 23) if kind == "packed jsonl" else [[border, *row] for row in rows]
        return write_ids(directory / "ids.jsonl", lines), arguments
    lists = pyarrow.array(rows, pyarrow.large_list(pyarrow.int64()) if kind == "large parquet" else None)
    if kind == "packed parquet":
        full = np.append(ids, np.full(-len(ids) % 16, border)).reshape(-1, 16)
        lists = pyarrow.array(full.tolist(), pyarrow.list_(pyarrow.uint16(), 16))
    parquet.write_table(pyarrow.table({"input_ids": lists}), directory / "ids.parquet", row_group_size=40)
    return str(directory / "ids.parquet"), arguments


KINDS = (
    *(*FLAT, "borders behind", "compressed", "files of a folder", "npy", "rows of npy"),
    *("llm.c", "llm.c of Llama", "megatron", "megatron by sentences", "megatron of several", "jsonl", "packed jsonl"),
    *("parquet", "large parquet", "packed parquet", "hugging face"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dataset_of_ids_is_that_of_their_text(kind, tmp_path, monkeypatch, made):
    """Byte for byte: the same split, tokens, boundaries and sizes."""
    monkeypatch.setattr("jaxlinear.data.token_files._PART", 100)  # documents span several parts
    monkeypatch.setattr("jaxlinear.data.compressed._CHUNK", 101)  # and ids two chunks
    texts, tokenizer, file, expected = made
    monkeypatch.setattr("jaxlinear.data.encoding._BATCH_DOCUMENTS", 40)
    rows = [{"input_ids": row.tolist()} for row in tokenizer.encode_batch(texts)]
    package = types.SimpleNamespace(load_dataset=lambda *arguments, split: rows)
    monkeypatch.setitem(sys.modules, "datasets", package)
    (tmp_path / "source").mkdir()
    source, arguments = of_file(kind, tmp_path / "source", tokenizer, texts)
    arguments |= {**OPTIONS, "workers": 2 if kind == "uint16" else 1}
    manifest = prepare(source, tmp_path / "out", tokenizer=file, **arguments)
    assert dataset(tmp_path / "out") == expected
    assert (manifest.records.read, manifest.records.broken, manifest.records.empty) == (len(texts), 0, 0)


def refused(source, output, **arguments) -> str:
    with pytest.raises(UserError) as error:
        prepare(str(source), output, **{**OPTIONS, **arguments})
    assert not output.exists()
    return str(error.value)


def of_another(ids) -> np.ndarray:
    """The ids of a tokenizer with the same tokens in another order."""
    return 1 + 7 * np.asarray(ids) % 397


def looked_at(tokenizer, rows) -> None:
    agreement = token_ids.Agreement("the source", tokenizer)
    for row in rows:
        agreement.see(np.asarray(row), tokenizer.decode(row))
    agreement.finish()


def test_ids_of_another_tokenizer_are_refused(tmp_path, caplog, made):
    texts, tokenizer, file, _ = made
    rows = tokenizer.encode_batch(texts)
    for count, seen in ((150, 100), (20, 20)):
        with pytest.raises(UserError, match=f"only 1?[0-9]% of the ids of the first {seen} documents of .*--tokenizer"):
            looked_at(tokenizer, map(of_another, rows[:count]))
    source = write_ids(tmp_path / "a.jsonl", map(of_another, rows))
    assert "another tokenizer" in refused(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids")
    looked_at(tokenizer, [row if i % 4 else of_another(row) for i, row in enumerate(rows)])
    (message,) = caplog.messages
    assert re.match(r"only 7[0-9]% of the ids of the first 100 documents .* another tokenizer", message)


@pytest.mark.parametrize("kind", ["words", "characters of 250", "characters of 1023", "long"])
def test_documents_that_were_truncated_are_this_tokenizers_all_the_same(monkeypatch, caplog, made, kind):
    """For example, rows of a fixed length, which begin and end within words or characters: the text has other characters in
    place of these. Of a long document only the beginning is read: a billion bytes would not fit into memory as a list."""
    texts, tokenizer, *_ = made
    rows = tokenizer.encode_batch(texts)
    if kind == "words":
        ids = np.concatenate(rows)
        rows = np.split(ids[: len(ids) // 50 * 50], len(ids) // 50)
    elif kind == "long":
        monkeypatch.setattr(token_ids, "_OF_EACH", 40)
        rows = [np.concatenate([row, of_another(row)]) for row in rows if len(row) > 40]
    else:
        tokenizer, length = BytesTokenizer(), int(kind.split()[-1])
        content = "日本語のデータ。🙂".encode() * 4000
        rows = [list(content[start : start + length]) for start in range(1, length * 90, length)]
    assert len(rows) > 50
    looked_at(tokenizer, rows)
    assert not caplog.messages


def test_a_special_token_at_the_end_of_all_documents_is_said(tmp_path, caplog, made):
    file = json_tokenizer(tmp_path, ["<|endoftext|>", "</s>"])
    tokenizer, named = open_tokenizer(file), open_tokenizer(file, "</s>")
    rows = [[*ids, named.document_token] for ids in tokenizer.encode_batch(made[0])]
    looked_at(tokenizer, rows)
    (message,) = caplog.messages
    assert message.startswith(
        f"100 of the first 100 documents of the source end with the token {named.document_token}, "
    )
    caplog.clear()
    looked_at(named, [record.ids for record in token_ids.Ids.of(named).documents(records(*rows))])
    assert not caplog.messages


IDS = token_ids.Ids(400, 9, "<border>")


def records(*rows) -> list[Record]:
    """A broken record for None."""
    return [
        Record("a", None, "broken") if row is None else Record("a", None, ids=np.array(row, np.uint32)) for row in rows
    ]


def test_broken_rows_are_named():
    strange = "does not belong to the tokenizer, whose ids are 0 to 399"
    for value, key in (
        ("text", "not a list of ids but str"),
        (None, "not a list of ids but NoneType"),
        ([1, 2.0], "has 2.0, but ids must be integers"),
        ([1, True], "has True, but ids must be integers"),
        ([[1]], "has [1], but ids must be integers"),
        ([1 << 70], "ids must be integers"),
        ([1, 400], f"the id 400 at position 1 {strange}"),
        ([-1], f"the id -1 at position 0 {strange}"),
    ):
        assert key in IDS.record("a", value, "input_ids").error
    inside, *empty = IDS.documents(records([5, 9, 5], [], [9]))
    assert "is inside it" in inside.error and [len(record.ids) for record in empty] == [0, 0]


def test_a_document_token_within_a_row_is_no_border_unless_rows_are_packed(tmp_path, made):
    texts, tokenizer, file, expected = made
    rows = np.array_split(stream(tokenizer, texts), 5)
    source = write_ids(tmp_path / "a.jsonl", rows)
    said = refused(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids")
    assert f"among the first 5 of {source}: {source}:1: " in said and "--packed_rows" in said
    prepare(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids", packed_rows=True, **OPTIONS)
    assert dataset(tmp_path / "out") == expected


def test_broken_rows_of_a_stream_end_a_document():
    """Nothing is joined across what is lost."""
    found = IDS.split("the source", records([9, 1, 2], None, [3], [9, 4, 5], [6], [9]))
    assert [record.error or record.ids.tolist() for record in found] == [[1, 2], "broken", [3], [4, 5, 6]]


def test_a_stream_without_the_document_token_is_refused(monkeypatch):
    monkeypatch.setattr(token_ids, "_WITHOUT_A_BORDER", 5)
    for rows, where in (
        ([[1, 2]], "the source, so"),
        ([[1, 2, 3], [4, 5, 6], [9]], "6 tokens in a row of the source"),
        ([[9, 1, 2, 3], [4, 5, 6]], "6 tokens in a row of the source"),  # once, as before a whole corpus
    ):
        with pytest.raises(UserError, match=rf"<border>' \(9\) is nowhere in {where}.* --document_token"):
            list(IDS.split("the source", records(*rows)))


def test_files_that_are_not_what_they_are_said_to_be(tmp_path, made):
    texts, tokenizer, file, _ = made
    out, path, npy = tmp_path / "out", tmp_path / "a.bin", tmp_path / "a.npy"
    ids = stream(tokenizer, texts)
    flat = ids.astype("<u2").tobytes()

    def check(content, *keys, source=path) -> None:
        if content is not None:
            source.write_bytes(content if isinstance(content, bytes) else content.tobytes())
        for form, key in keys:
            assert key in refused(source, out, tokenizer=file, token_files=form)

    def saved(array) -> bytes:
        np.save(tmp_path / "saved.npy", array)
        return (tmp_path / "saved.npy").read_bytes()

    check(
        ids.astype("<u4"), ("uint16", "ids of 4 bytes or more were read as 2 bytes; perhaps use --token_files=uint32")
    )
    check(ids.astype("<i8"), ("int32", "ids of 8 bytes or more were read as 4 bytes; perhaps use --token_files=int64"))
    check(flat, ("uint32", "whose ids are 0 to 399; were they made by another tokenizer"), ("npy", "not a NumPy array"))
    check(flat + b"\1", ("uint16", f"1 bytes are left after {len(ids)}"), ("megatron", "no Megatron-LM index a.idx"))
    check(None, ("llm.c", "does not begin like a token file of llm.c"))
    write_llm_c(path, ids)
    check(None, ("uint16", "--token_files=llm.c"))
    write_llm_c(path, ids, count=len(ids) + 1)
    check(None, ("llm.c", "is damaged: "))
    by_columns = saved(np.asfortranarray(ids[:100].reshape(20, 5)))
    check(by_columns, ("npy", "is in column-major"), ("uint16", "--token_files=npy"), source=npy)
    check(b"PK\x03\x04 and no more", ("npy", "is not a NumPy array (.npy)"), source=npy)
    check(saved(ids.astype(np.float32)), ("npy", f"float32 [{len(ids)}]"), source=npy)
    np.savez(tmp_path / "a.npz", ids=ids)
    check(None, ("npy", "holds several arrays (.npz)"), source=tmp_path / "a.npz")
    packed = tmp_path / "a.bin.gz"
    check(gzip.compress(by_columns), ("uint16", "begins like a NumPy array"), source=packed)
    check(b"", *((form, "is compressed") for form in ("npy", "llm.c", "megatron")), source=packed)
    packed.write_bytes(gzip.compress(flat)[:-20])
    assert "broken" in refused(packed, out, tokenizer=file, token_files="uint16", max_broken_fraction=0)


def test_what_is_wrong_with_a_later_file_is_said_before_the_first_is_read(tmp_path, made, monkeypatch):
    _, _, file, _ = made
    np.save(tmp_path / "a.npy", np.arange(9))
    np.save(tmp_path / "b.npy", np.arange(9.0))
    monkeypatch.setattr("jaxlinear.data.token_files.records", None)
    said = refused(tmp_path, tmp_path / "out", tokenizer=file, token_files="npy", suffixes=[".npy"])
    assert said.startswith(f"{tmp_path}/b.npy is float64")


def test_one_document_of_ids(tmp_path, made):
    """The message does not advise cutting its text."""
    _, _, file, _ = made
    options = {"tokenizer": file, "tokens_field": "input_ids"}
    said = refused(write_ids(tmp_path / "a.jsonl", [[1, 2, 3]]), tmp_path / "out", **options)
    assert said.endswith("the splits need two different documents")
    said = refused(write_ids(tmp_path / "b.jsonl", [[], []]), tmp_path / "out", **options)
    assert said.endswith("has no tokens: all of its 2 documents are empty")


def test_damaged_indices_of_megatron_are_refused(tmp_path, made):
    _, tokenizer, file, _ = made
    path, index = tmp_path / "a.bin", tmp_path / "a.idx"
    border = tokenizer.document_token

    def check(key, form="megatron") -> None:
        assert key in refused(path, tmp_path / "out", tokenizer=file, token_files=form)

    write_megatron(path, [[[1, 2, border]], [[3, border]]])
    check("--token_files=megatron", "int32")
    whole, tokens = index.read_bytes(), path.read_bytes()
    for damaged in (tokens[:-4], tokens + b"\0"):
        path.write_bytes(damaged)
        check(f"{index} is not the index of a.bin, which has {len(damaged)} bytes")
    path.write_bytes(tokens)
    for damaged, key in (
        (whole[:-1], "ends before its 2 sequences and 3 document boundaries"),
        (whole[:20], "ends within its header"),
        (whole[:17] + b"\7" + whole[18:], "version 1 and dtype 7"),  # float32
        (whole[:-8] + struct.pack("<q", 5), f"{index} is not the index of a.bin"),
    ):
        index.write_bytes(damaged)
        check(key)
    write_megatron(path, [[[1, 2, border]], [[3, 400]]])
    check(f"document 2 of {path}: the id 400 at position 1")


OF_FILES = {"tokens_field": None, "token_files": "npy"}


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"tokenizer": "bpe"}, "needs the existing tokenizer"),
        ({"text_field": "x"}, "text_field is for text"),
        ({"document_separator": "x"}, "document_separator is for text"),
        ({"token_files": "npy"}, "give only one of them"),
        ({**OF_FILES, "packed_rows": True}, "packed_rows is for tokens_field"),
        ({"tokens_field": None, "packed_rows": True}, "packed_rows is for rows of tokens"),
        ({"tokens_field": None, "token_files": "raw"}, "token_files='raw' must be one of uint16, "),
        (OF_FILES, "a.jsonl has records"),
        ({"source": "python-stdlib"}, "python-stdlib is text"),
        ({"source": "a.txt"}, "a.txt is not JSONL or Parquet"),
        ({"source": "hf:x", **OF_FILES}, "hf:x has records"),
        ({"source": "hf:x", "suffixes": [".a"]}, "suffixes does nothing for hf:x"),
        ({"tokens_field": "tokens"}, "no field 'tokens' (its fields: input_ids)"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_ids(tmp_path / "a.jsonl", [[1], [2]])
    (tmp_path / "a.txt").write_text("a")
    given = {"source": "a.jsonl", "tokenizer": "bytes", "tokens_field": "input_ids", **arguments}
    assert key in refused(given.pop("source"), tmp_path / "out", **given)


@pytest.mark.parametrize(
    "column, key",
    [
        (["a"], "not lists of integers but string"),
        ([[1.0]], "not lists of integers but list<"),
        ([[1, None], None], "null"),
    ],
)
def test_parquet_columns_that_are_no_ids(tmp_path, column, key):
    parquet.write_table(pyarrow.table({"input_ids": pyarrow.array(column)}), tmp_path / "a.parquet")
    assert key in refused(tmp_path / "a.parquet", tmp_path / "out", tokenizer="bytes", tokens_field="input_ids")
