"""Sources of token ids: the dataset equals the one made from their text, in every format; files that differ from what is
declared are refused."""

import gzip
import json
import logging
import re
import struct
import sys
import types

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxlinear.data import prepare, token_ids
from jaxlinear.data.tokenizer import BytesTokenizer, train_bpe
from jaxlinear.errors import UserError
from tests.data.sources_of_text import files, make_texts, write_jsonl

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


def stream(tokenizer, texts, *, border_first=True) -> np.ndarray:
    border = [tokenizer.document_token]
    parts = [[*border, *ids] if border_first else [*ids, *border] for ids in tokenizer.encode_batch(texts)]
    return np.concatenate(parts)


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
    if kind in ("uint16", "uint32", "int32", "int64"):
        ids.astype(np.dtype(kind).newbyteorder("<")).tofile(directory / "ids.bin")
        return str(directory / "ids.bin"), {"token_files": kind}
    if kind == "borders behind":
        stream(tokenizer, texts, border_first=False).astype("<u2").tofile(directory / "ids.bin")
        return str(directory / "ids.bin"), {"token_files": "uint16"}
    if kind == "compressed":
        (directory / "ids.bin.gz").write_bytes(gzip.compress(ids.astype("<u2").tobytes()))
        return str(directory / "ids.bin.gz"), {"token_files": "uint16"}
    if kind == "files of a folder":  # cut within documents
        for i, part in enumerate(np.array_split(ids, 7)):
            part.astype("<u2").tofile(directory / f"{i}.bin")
        return str(directory), {"token_files": "uint16"}
    if kind == "npy":
        np.save(directory / "ids.npy", ids.astype(np.int32))
        return str(directory), {"token_files": "npy"}
    if kind == "rows of npy":
        ids = np.append(ids, np.full(-len(ids) % 32, border))
        np.save(directory / "ids.npy", ids.reshape(-1, 32))
        return str(directory / "ids.npy"), {"token_files": "npy"}
    if kind == "llm.c":
        return write_llm_c(directory / "ids.bin", ids), {"token_files": "llm.c"}
    if kind == "llm.c of Llama":
        return write_llm_c(directory / "ids.bin", ids, 20240801, 7, "<u4"), {"token_files": "llm.c"}
    if kind == "megatron":
        return write_megatron(directory / "ids.bin", [[[*row, border]] for row in rows]), {"token_files": "megatron"}
    if kind == "megatron of several":  # two documents as one, as from text with the borders spelled out
        pairs = [[[*first, border, *second, border]] for first, second in zip(rows[::2], rows[1::2], strict=True)]
        return write_megatron(directory / "ids.bin", pairs), {"token_files": "megatron"}
    if kind == "megatron by sentences":
        documents = [[row[:1], row[1:], [border]] for row in rows]
        return write_megatron(directory / "ids.bin", documents, 8, "<u2"), {"token_files": "megatron"}
    if kind == "jsonl":
        return write_ids(directory / "ids.jsonl", [[border, *row] for row in rows]), {"tokens_field": "input_ids"}
    if kind == "packed jsonl":
        packed = np.array_split(ids, 23)
        return write_ids(directory / "ids.jsonl", packed), {"tokens_field": "input_ids", "packed_rows": True}
    lists = pyarrow.array(rows, pyarrow.large_list(pyarrow.int64()) if kind == "large parquet" else None)
    if kind == "packed parquet":
        full = ids[: len(ids) // 16 * 16].reshape(-1, 16).tolist()
        rest = ids[len(ids) // 16 * 16 :].tolist() + [border] * (-len(ids) % 16)
        lists = pyarrow.array([*full, rest], pyarrow.list_(pyarrow.uint16(), 16))
    parquet.write_table(pyarrow.table({"input_ids": lists}), directory / "ids.parquet", row_group_size=40)
    return str(directory / "ids.parquet"), {"tokens_field": "input_ids", "packed_rows": kind.startswith("packed")}


KINDS = (
    *("uint16", "uint32", "int32", "int64", "borders behind", "compressed", "files of a folder", "npy", "rows of npy"),
    *("llm.c", "llm.c of Llama", "megatron", "megatron by sentences", "megatron of several", "jsonl", "packed jsonl"),
    *("parquet", "large parquet", "packed parquet"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dataset_of_ids_is_that_of_their_text(kind, tmp_path, monkeypatch, made):
    """Byte for byte: the same split, tokens, boundaries and sizes."""
    monkeypatch.setattr("jaxlinear.data.token_files._PART", 100)  # documents span several parts
    monkeypatch.setattr("jaxlinear.data.compressed._CHUNK", 101)  # and ids two chunks
    texts, tokenizer, file, expected = made
    (tmp_path / "source").mkdir()
    source, arguments = of_file(kind, tmp_path / "source", tokenizer, texts)
    manifest = prepare(source, tmp_path / "out", tokenizer=file, **arguments, **OPTIONS)
    assert dataset(tmp_path / "out") == expected
    assert (manifest.records.read, manifest.records.broken, manifest.records.empty) == (len(texts), 0, 0)


def test_rows_of_a_dataset_of_hugging_face(tmp_path, monkeypatch, made):
    texts, tokenizer, file, expected = made
    rows = [{"tokens": [int(token) for token in row]} for row in tokenizer.encode_batch(texts)]
    package = types.SimpleNamespace(load_dataset=lambda *arguments, split: rows)
    monkeypatch.setitem(sys.modules, "datasets", package)
    prepare("hf:org/name", tmp_path / "out", tokenizer=file, tokens_field="tokens", **OPTIONS)
    assert dataset(tmp_path / "out") == expected


def test_any_number_of_workers(tmp_path, monkeypatch, made):
    monkeypatch.setattr("jaxlinear.data.encoding._BATCH_DOCUMENTS", 40)
    texts, tokenizer, file, expected = made
    source, arguments = of_file("uint16", tmp_path, tokenizer, texts)
    prepare(source, tmp_path / "out", tokenizer=file, **arguments, **{**OPTIONS, "workers": 2})
    assert dataset(tmp_path / "out") == expected


def refused(source, output, **arguments) -> str:
    with pytest.raises(UserError) as error:
        prepare(str(source), output, **{**OPTIONS, **arguments})
    assert not output.exists()
    return str(error.value)


def of_another(ids) -> np.ndarray:
    """The ids of a tokenizer with the same tokens in another order."""
    return 1 + 7 * np.asarray(ids) % 397


def test_ids_of_another_tokenizer_are_refused(tmp_path, made):
    texts, tokenizer, file, _ = made
    for count, seen in ((150, 100), (20, 20)):
        rows = [of_another(row) for row in tokenizer.encode_batch(texts[:count])]
        source = write_ids(tmp_path / "a.jsonl", rows)
        said = refused(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids")
        assert re.match(
            rf"only 1?[0-9]% of the ids of the first {seen} documents of {source} match the tokenizer's encoding", said
        )
        assert said.endswith(" of their text: another tokenizer made them; give that one as --tokenizer")


def test_some_documents_of_another_tokenizer_are_said(tmp_path, caplog, made):
    texts, tokenizer, file, _ = made
    rows = [row if i % 4 else of_another(row) for i, row in enumerate(tokenizer.encode_batch(texts))]
    with caplog.at_level(logging.WARNING):
        source = write_ids(tmp_path / "a.jsonl", rows)
        prepare(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids", **OPTIONS)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"only 7[0-9]% of the ids of the first 100 documents of ", message)
    assert message.endswith(" match the tokenizer's encoding of their text: was it another tokenizer that made them?")


def test_documents_that_were_cut_are_this_tokenizers_all_the_same(tmp_path, caplog, made):
    """For example, rows of a fixed length, which begin and end within words."""
    texts, tokenizer, file, _ = made
    ids = np.concatenate(tokenizer.encode_batch(texts))
    rows = np.split(ids[: len(ids) // 50 * 50], len(ids) // 50)
    with caplog.at_level(logging.WARNING):
        source = write_ids(tmp_path / "a.jsonl", rows)
        manifest = prepare(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids", **OPTIONS)
    assert sum(split.documents for split in manifest.splits.values()) == len(rows) and not caplog.records


def test_of_long_documents_the_beginning_is_looked_at(tmp_path, caplog, monkeypatch, made):
    """A billion bytes would not fit into memory as a Python list."""
    monkeypatch.setattr(token_ids, "_OF_EACH", 40)
    texts, tokenizer, file, _ = made
    rows = [np.concatenate([row, of_another(row)]) for row in tokenizer.encode_batch(texts) if len(row) > 40]
    with caplog.at_level(logging.WARNING):
        source = write_ids(tmp_path / "a.jsonl", rows)
        prepare(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids", **OPTIONS)
    assert len(rows) > 50 and not caplog.records


def test_a_special_token_at_the_end_of_all_documents_is_said(tmp_path, caplog, made):
    import tokenizers

    texts, _, file, _ = made
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.encode_special_tokens = True
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>")
    rows = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    options = {"tokenizer": str(tmp_path / "tokenizer.json"), "tokens_field": "input_ids", **OPTIONS}
    with caplog.at_level(logging.WARNING):
        source = write_ids(tmp_path / "a.jsonl", rows)
        prepare(source, tmp_path / "out", **options)
        assert [record.getMessage() for record in caplog.records] == [
            f"100 of the first 100 documents of {source} end with the token {end}, which decodes to no text and is kept; "
            "--document_token names the one between documents"
        ]
        caplog.clear()
        named = prepare(source, tmp_path / "named", document_token="</s>", **options)
        assert not caplog.records and named.document_token == end


def test_broken_rows_are_left_out_by_name(tmp_path, caplog, made):
    texts, tokenizer, file, _ = made
    rows = [[int(token) for token in row] for row in tokenizer.encode_batch(texts)]
    border, beyond = tokenizer.document_token, tokenizer.vocab_size
    bad = ["text", [1, 2.0], [1, True], [1, beyond], [-1], [5, border, 5], [1 << 70], [[1]], None]
    values = [{"input_ids": row} for row in [*rows[:1], *bad, [], [border], *rows[1:]]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in [*values, {"ids": []}]))
    options = {"tokenizer": file, "tokens_field": "input_ids", **OPTIONS}
    with caplog.at_level(logging.WARNING):
        manifest = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", max_broken_fraction=0.1, **options)
    assert (manifest.records.broken, manifest.records.empty) == (len(bad) + 1, 2)
    assert [record.getMessage().split(".jsonl:")[1] for record in caplog.records] == [
        "2: field 'input_ids' is not a list of ids but str",
        "3: field 'input_ids' has 2.0, but ids must be integers",
        "4: field 'input_ids' has True, but ids must be integers",
        f"5: field 'input_ids': the id {beyond} at position 1 does not belong to the tokenizer, whose ids are 0 "
        f"to {beyond - 1}",
        f"6: field 'input_ids': the id -1 at position 0 does not belong to the tokenizer, whose ids are 0 to {beyond - 1}",
    ]
    said = refused(tmp_path / "a.jsonl", tmp_path / "more", max_broken_fraction=0.01, **{**options, "workers": 1})
    assert said.startswith("10 of 162 records of ")


def test_a_document_token_within_a_row_is_no_border_unless_rows_are_packed(tmp_path, made):
    texts, tokenizer, file, expected = made
    rows = np.array_split(stream(tokenizer, texts), 5)
    source = write_ids(tmp_path / "a.jsonl", rows)
    said = refused(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids")
    assert said.startswith(
        f"no usable document among the first 5 of {source}: {source}:1: the document token '<|endoftext|>' "
    )
    assert said.endswith("is inside it; --packed_rows cuts there")
    prepare(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids", packed_rows=True, **OPTIONS)
    assert dataset(tmp_path / "out") == expected


def test_broken_rows_of_a_stream_end_a_document(tmp_path, caplog, made):
    """Nothing is joined across what is lost."""
    texts, tokenizer, file, _ = made
    border = tokenizer.document_token
    first, second, *others = ([int(token) for token in row] for row in tokenizer.encode_batch(texts))
    lines = [[border, *first], None, [*second], *([border, *row] for row in others)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": line}) + "\n" for line in lines))
    options = {"tokens_field": "input_ids", "packed_rows": True}
    manifest = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=file, **options, **OPTIONS)
    assert sum(split.documents for split in manifest.splits.values()) == len(texts)
    assert manifest.records.broken == 1


def test_a_stream_without_the_document_token_is_refused(tmp_path, monkeypatch, made):
    texts, tokenizer, file, _ = made
    ids = np.concatenate(tokenizer.encode_batch(texts))
    ids.astype("<u2").tofile(tmp_path / "a.bin")
    said = refused(tmp_path / "a.bin", tmp_path / "out", tokenizer=file, token_files="uint16")
    assert said == (
        f"the document token '<|endoftext|>' ({tokenizer.document_token}) is nowhere in {tmp_path}/a.bin, so no document "
        "ends there; --document_token names the one between documents"
    )
    monkeypatch.setattr(token_ids, "_WITHOUT_A_BORDER", 500)
    monkeypatch.setattr("jaxlinear.data.token_files._PART", 400)
    np.save(tmp_path / "a.npy", ids)
    said = refused(tmp_path / "a.npy", tmp_path / "out", tokenizer=file, token_files="npy")
    assert f"is nowhere in 800 tokens in a row of {tmp_path}/a.npy" in said
    np.save(tmp_path / "a.npy", np.append(tokenizer.document_token, ids))  # once, as before a whole corpus
    said = refused(tmp_path / "a.npy", tmp_path / "out", tokenizer=file, token_files="npy")
    assert f"is nowhere in 799 tokens in a row of {tmp_path}/a.npy" in said


def test_files_that_are_not_what_they_are_said_to_be(tmp_path, made):
    texts, tokenizer, file, _ = made
    out, path, npy = tmp_path / "out", tmp_path / "a.bin", tmp_path / "a.npy"
    ids = stream(tokenizer, texts)

    def why(form, source=path) -> str:
        return refused(source, out, tokenizer=file, token_files=form)

    ids.astype("<u4").tofile(path)
    assert "as if ids of 4 bytes or more were read as 2 bytes; perhaps use --token_files=uint32" in why("uint16")
    ids.astype("<i8").tofile(path)
    assert "as if ids of 8 bytes or more were read as 4 bytes; perhaps use --token_files=int64" in why("int32")
    ids.astype("<u2").tofile(path)
    assert (
        "does not belong to the tokenizer, whose ids are 0 to 399; were they made by another tokenizer, or do"
        in why("uint32")
    )
    path.write_bytes(ids.astype("<u2").tobytes() + b"\1")
    assert why("uint16") == f"{path} is not a file of uint16: 1 bytes are left after {len(ids)} of them"
    assert "does not begin like a token file of llm.c" in why("llm.c")
    assert why("megatron") == f"{path} has no Megatron-LM index a.idx beside it"
    assert "is not a NumPy array (.npy)" in why("npy")
    write_llm_c(path, ids)
    assert why("uint16") == f"{path} begins like a file of llm.c: use --token_files=llm.c"
    write_llm_c(path, ids, count=len(ids) + 1)
    assert "is damaged: " in why("llm.c")
    np.save(npy, np.asfortranarray(ids[:100].reshape(20, 5)))
    assert "is in column-major" in why("npy", npy)
    assert why("uint16", npy) == f"{npy} begins like a NumPy array: use --token_files=npy"
    (tmp_path / "npy.bin.gz").write_bytes(gzip.compress(npy.read_bytes()))
    assert "begins like a NumPy array" in why("uint16", tmp_path / "npy.bin.gz")
    (tmp_path / "pk.npy").write_bytes(b"PK\x03\x04 and no more")
    assert "is not a NumPy array (.npy)" in why("npy", tmp_path / "pk.npy")
    np.save(npy, ids.astype(np.float32))
    assert f"{npy} is float32 [{len(ids)}]; ids must be integers in one or two dimensions" == why("npy", npy)
    np.savez(tmp_path / "a.npz", ids=ids)
    assert "holds several arrays (.npz)" in why("npy", tmp_path / "a.npz")
    for form in ("npy", "llm.c", "megatron"):
        (tmp_path / "a.bin.gz").write_bytes(b"")
        assert "is compressed, and only flat ids (uint16, uint32, int32, int64)" in why(form, tmp_path / "a.bin.gz")
    (tmp_path / "a.bin.gz").write_bytes(gzip.compress(ids.astype("<u2").tobytes())[:-20])
    said = refused(tmp_path / "a.bin.gz", out, tokenizer=file, token_files="uint16", max_broken_fraction=0)
    assert said.startswith("1 of ") and "are broken, more than max_broken_fraction 0 allows" in said


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
    said = refused(
        write_ids(tmp_path / "a.jsonl", [[1, 2, 3]]), tmp_path / "out", tokenizer=file, tokens_field="input_ids"
    )
    assert said.endswith("none of 1 documents falls into it; the splits need two different documents")
    source = write_ids(tmp_path / "b.jsonl", [[], []])
    said = refused(source, tmp_path / "out", tokenizer=file, tokens_field="input_ids")
    assert said == f"{source} has no tokens: all of its 2 documents are empty"


@pytest.mark.parametrize("length", [250, 1023])
def test_rows_that_begin_and_end_within_a_character(tmp_path, caplog, length):
    """The cut ids differ from the tokenizer's ids of their text, in which other characters replace the cut ones."""
    content = "日本語のデータ。🙂".encode() * 4000
    rows = [list(content[start : start + length]) for start in range(1, length * 90, length)]
    with caplog.at_level(logging.WARNING):
        source = write_ids(tmp_path / "a.jsonl", rows)
        manifest = prepare(source, tmp_path / "out", tokenizer="bytes", tokens_field="input_ids", **OPTIONS)
    assert manifest.records.broken == 0 and not caplog.records


def test_damaged_indices_of_megatron_are_refused(tmp_path, made):
    _, tokenizer, file, _ = made
    path, index = tmp_path / "a.bin", tmp_path / "a.idx"
    border = tokenizer.document_token

    def said() -> str:
        return refused(path, tmp_path / "out", tokenizer=file, token_files="megatron")

    write_megatron(path, [[[1, 2, border]], [[3, border]]])
    assert refused(path, tmp_path / "out", tokenizer=file, token_files="int32").endswith("--token_files=megatron")
    whole, tokens = index.read_bytes(), path.read_bytes()
    for damaged in (tokens[:-4], tokens + b"\0"):
        path.write_bytes(damaged)
        assert (
            said() == f"{index} is not the index of a.bin, which has {len(damaged)} bytes, or one of the two is damaged"
        )
    path.write_bytes(tokens)
    index.write_bytes(whole[:-1])
    assert said() == f"{index} is damaged: it ends before its 2 sequences and 3 document boundaries"
    index.write_bytes(whole[:20])
    assert said() == f"{index} is damaged: it ends within its header"
    index.write_bytes(whole[:17] + b"\7" + whole[18:])  # float32
    assert said() == f"{index} has version 1 and dtype 7; only version 1 with an integer dtype can be read"
    index.write_bytes(whole[:-8] + struct.pack("<q", 5))
    assert said().startswith(f"{index} is not the index of a.bin")
    write_megatron(path, [[[1, 2, border]], [[3, 400]]])
    assert said().startswith(f"document 2 of {path}: the id 400 at position 1 does not belong to the tokenizer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "bpe"}, "a source of tokens needs the existing tokenizer that made them: --tokenizer names it"),
        (
            {"text_field": "x"},
            "text_field is for text, but tokens_field or token_files says that the source has tokens; leave one out",
        ),
        (
            {"document_separator": "x"},
            "document_separator is for text, but tokens_field or token_files says that the source has tokens; leave",
        ),
        ({"token_files": "npy"}, "tokens_field is for records and token_files for files of ids; give only one of them"),
        (
            {"tokens_field": None, "token_files": "npy", "packed_rows": True},
            "packed_rows is for tokens_field, and a file of ids",
        ),
        (
            {"tokens_field": None, "packed_rows": True},
            "packed_rows is for rows of tokens (--tokens_field)",
        ),
        (
            {"tokens_field": None, "token_files": "raw"},
            "token_files='raw' must be one of uint16, uint32, int32, int64, npy,",
        ),
        (
            {"tokens_field": None, "token_files": "npy"},
            "a.jsonl has records and is not a file of ids; name their field with --tokens_field",
        ),
        ({"source": "python-stdlib"}, "python-stdlib is text; tokens_field and token_files are for sources of tokens"),
        (
            {"source": "a.txt"},
            "a.txt is not JSONL or Parquet and has no records; give the format of its ids with --token_files",
        ),
        (
            {"source": "hf:x", "tokens_field": None, "token_files": "npy"},
            "token_files is for files of ids, but hf:x has records",
        ),
        ({"source": "hf:x", "suffixes": [".a"]}, "suffixes does nothing for hf:x: it is for a folder; leave it out"),
        ({"tokens_field": "tokens"}, "no field 'tokens' (its fields: input_ids); --tokens_field chooses"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_ids(tmp_path / "a.jsonl", [[1], [2]])
    (tmp_path / "a.txt").write_text("a")
    given = {"source": "a.jsonl", "tokenizer": "bytes", "tokens_field": "input_ids", **arguments}
    assert message in refused(given.pop("source"), tmp_path / "out", **given)


def test_parquet_columns_that_are_no_ids(tmp_path):
    def said(column) -> str:
        parquet.write_table(pyarrow.table({"input_ids": column}), tmp_path / "a.parquet")
        return refused(tmp_path / "a.parquet", tmp_path / "out", tokenizer="bytes", tokens_field="input_ids")

    assert said(pyarrow.array(["a"])).endswith("is not lists of integers but string")
    assert "is not lists of integers but list<" in said(pyarrow.array([[1.0]]))
    assert said(pyarrow.array([[1, None], None])).endswith("field 'input_ids' is null or has a null id")


def test_ids_of_bytes(tmp_path):
    texts = make_texts(1, 40, longest=20)
    write_jsonl(tmp_path / "text.jsonl", texts)
    prepare(str(tmp_path / "text.jsonl"), tmp_path / "of_text", tokenizer="bytes", **OPTIONS)
    stream(BytesTokenizer(), texts).astype("<u2").tofile(tmp_path / "a.bin")
    prepare(str(tmp_path / "a.bin"), tmp_path / "of_ids", tokenizer="bytes", token_files="uint16", **OPTIONS)
    assert dataset(tmp_path / "of_ids") == dataset(tmp_path / "of_text")
