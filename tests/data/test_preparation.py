"""Preparation: lossless, split without overlap, independent of the workers."""

import contextlib
import gzip
import json
import lzma
import multiprocessing
import os

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxlinear.data import encoding, load_tokenizer, preparation, prepare, read_manifest
from jaxlinear.data.manifest import TokenizerInfo
from jaxlinear.data.records import Record, Source
from jaxlinear.data.splitting import Splitter
from jaxlinear.data.tokenizer import BytesTokenizer, train_bpe
from jaxlinear.errors import RunError, UserError
from tests.data.sources_of_text import files, make_texts, stream_and_segments, write_jsonl
from tests.data.test_tokenizer import edited


def read_texts(dataset, split) -> list[str]:
    tokenizer = load_tokenizer(dataset)
    stream, documents = stream_and_segments(dataset, split)
    starts = np.flatnonzero(np.diff(documents, prepend=0))
    assert starts.tolist() == np.flatnonzero(stream == tokenizer.document_token).tolist()
    return [tokenizer.decode(document[1:]) for document in np.split(stream, starts[1:])]


def json_tokenizer(directory, change=lambda fields: None) -> str:
    """A small BPE's file, with its fields changed."""
    train_bpe(make_texts(5, 50), 290).save(directory)
    return edited(directory, change)


@pytest.fixture
def prepared(tmp_path):
    """A function that prepares texts, in one process unless it is given others, and returns (dataset, manifest)."""

    def make(texts, name="data", **options):
        source = write_jsonl(tmp_path / "a.jsonl", texts)
        options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "block_length": 64, "workers": 1} | options
        return tmp_path / name, prepare(source, tmp_path / name, **options)

    return make


@pytest.mark.parametrize("kind", ["bpe", "bytes", "more than 16 bits"])
def test_text_to_tokens_to_text(tmp_path, prepared, kind):
    """Documents that repeat are in the same split, which the seed chooses."""
    texts, seed = make_texts(0, 60) * 2, int(kind == "bytes")
    options = {"bpe": {"tokenizer": "bpe", "vocab_size": 300}}.get(kind, {})
    if kind == "more than 16 bits":
        file = json_tokenizer(tmp_path, lambda fields: fields["model"]["vocab"].update({"</s>": 70_000}))
        options = {"tokenizer": file, "document_token": "</s>"}
    data, manifest = prepared(texts, heldout_fraction=0.2, block_length=128, seed=seed, **options)
    assert (manifest.seed, manifest.heldout_fraction) == (seed, 0.2)  # the warning about mixtures reads them
    assert (manifest.source, manifest.records.read) == (str(tmp_path / "a.jsonl"), 120)
    saved = load_tokenizer(data)
    assert manifest.tokenizer == TokenizerInfo(saved.kind, saved.file, saved.sha256)
    vocabulary = {"bpe": ("uint16", 300, 0), "bytes": ("uint16", 257, 256)}.get(kind, ("uint32", 70_001, 70_000))
    assert (manifest.dtype, manifest.vocab_size, manifest.document_token) == vocabulary
    splitter, other = Splitter(seed, 0.2), Splitter(1 - seed, 0.2)
    assert any(splitter.split(text.encode()) != other.split(text.encode()) for text in texts)
    for name in ("train", "heldout"):
        part = read_texts(data, name)
        assert part == [text for text in texts if splitter.split(text.encode()) == name]
        split = manifest.splits[name]
        assert (split.documents, split.bytes) == (len(part), sum(len(text.encode()) for text in part))
    assert 10 <= len(part) <= 40
    assert manifest == read_manifest(data)
    content = "".join(part).encode()
    assert manifest.splits["heldout"].gzip_bytes == len(gzip.compress(content, 9))
    assert manifest.splits["heldout"].xz_bytes == len(lzma.compress(content, preset=9))
    assert manifest.splits["train"].gzip_bytes is None


def test_a_tokenizer_that_changes_text_is_warned_of(tmp_path, prepared, caplog):
    lower = json_tokenizer(tmp_path, lambda fields: fields.update(normalizer={"type": "Lowercase"}))
    texts = [f"Of {i} words" for i in range(50)] + [f"of {i}" for i in range(50)]
    data, manifest = prepared(texts, tokenizer=lower)
    changed = sum(text.startswith("of") and text.endswith("words") for text in read_texts(data, "heldout"))
    assert 5 < changed < manifest.splits["heldout"].documents
    (message,) = caplog.messages
    assert message.startswith(f"{changed} of {manifest.splits['heldout'].documents} held-out documents differ")


def test_workers_and_repetition_change_no_byte(prepared, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 16)  # so many batches that they can overtake each other
    options = {"tokenizer": "bpe", "vocab_size": 400, "block_length": 128}
    one, three, again = (
        files(prepared(make_texts(0, 300), f"{n}{i}", workers=n, **options)[0]) for i, n in enumerate((1, 3, 1))
    )
    names = ["heldout/00000.array_record", "manifest.json", "tokenizer.json", "tokenizer_info.json"]
    assert sorted(one) == [*names, "train/00000.array_record"]
    assert three == one and again == one


@pytest.fixture
def encoded(tmp_path, monkeypatch):
    """A function that encodes the numbers below 200 in two processes, after calling ``before`` with each."""
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 1)
    BytesTokenizer().save(tmp_path)

    def numbers(before):
        for i in range(200):
            before(i)
            yield str(i)

    return lambda before: encoding.encode_in_order(numbers(before), BytesTokenizer(), tmp_path, 2)


def test_little_of_the_source_is_read_ahead(encoded):
    """Even if documents are consumed slowly: a source may be larger than memory."""
    read = []
    with contextlib.closing(encoded(read.append)) as results:
        for i, (text, tokens) in zip(range(20), results, strict=False):
            assert text == str(i) and tokens.tolist() == list(text.encode())
            assert len(read) <= i + 8


def test_a_worker_that_is_killed_is_an_error_with_its_likely_reason(encoded):
    def kill(i):
        for child in multiprocessing.active_children() if i == 20 else ():
            child.kill()
            child.join()

    with pytest.raises(RunError, match="lack of memory"):
        list(encoded(kill))


def test_tokenizer_is_trained_on_the_training_split_only(prepared):
    splitter = Splitter(0, 0.3)
    plain = [text for text in make_texts(0, 200) if splitter.split(text.encode()) == "train"]
    marked = [text for i in range(100) if splitter.split((text := f"{i} unmistakable").encode()) == "heldout"]
    assert len(plain) > 100 and len(marked) > 20
    data, _ = prepared([*marked, *plain], tokenizer="bpe", vocab_size=1000)
    assert read_texts(data, "heldout") == marked
    vocabulary = json.loads((data / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("return" in token for token in vocabulary)
    assert not any("mis" in token for token in vocabulary)


def test_sample_for_the_tokenizer_is_bounded(prepared):
    texts = [f"word{i} " * 400 for i in range(200)]
    data, _ = prepared(texts, tokenizer="bpe", vocab_size=3000, train_bytes=50_000)
    vocabulary = json.loads((data / "tokenizer.json").read_text())["model"]["vocab"]
    # 50 kB are about 16 of the documents, from all over the source rather than the first 16.
    assert vocabulary.keys() >= {"word", "Ġword"} and len(vocabulary) < 600


@pytest.mark.parametrize(
    "train_bytes, known, sampled, read",
    [
        (40_000, True, (32_000, 40_000), (390, 400)),  # a tenth of each part, since it is a tenth of the whole
        (5_000, True, (5_000, 5_999), (40, 160)),  # 1 in 16, since at most 16 times as much is read
        (40_000, False, (40_000, 40_999), (40, 50)),  # the beginning of a source of unknown size
        (10**6, True, (360_000, 400_000), (400, 400)),
    ],
)
def test_the_sample_is_from_all_over_the_source(train_bytes, known, sampled, read):
    texts = [f"{i:03d}" + "é" * 498 + "." for i in range(400)]  # of 1000 bytes each
    given = []

    def records():
        for text in texts:
            given.append(text)
            yield Record("", text)

    source = Source("", 400_000 if known else None, records)
    sample = list(preparation._training_sample(source, Splitter(0, 0.05), train_bytes, 0))
    assert set(sample) <= set(texts) and len(set(sample)) == len(sample)
    assert not any(Splitter(0, 0.05).split(text.encode()) == "heldout" for text in sample)
    assert sampled[0] <= 1000 * len(sample) <= sampled[1] and read[0] <= len(given) <= read[1]
    assert sample == list(preparation._training_sample(source, Splitter(0, 0.05), train_bytes, 0))


def test_of_one_long_document_pieces_are_sampled():
    size = 1 << 14
    text = "".join(f"{i:07d} " for i in range(25 * size // 8))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    source = Source("", len(text), lambda: iter([Record("", text)]))
    sample = list(preparation._training_sample(source, Splitter(0, 1e-9), 5 * size, 1))
    assert 2 <= len(sample) <= 5 and set(sample) <= set(pieces) and sample != pieces[: len(sample)]


def test_broken_and_empty_records_are_counted_and_named(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [*make_texts(0, 195), "", ""])
    with file.open("a") as stream:
        stream.write("nonsense\n" * 7)
    options = {"tokenizer": "bytes", "workers": 1, "block_length": 64}
    manifest = prepare(str(file), tmp_path / "data", max_broken_fraction=0.05, **options)
    assert (manifest.records.read, manifest.records.broken, manifest.records.empty) == (204, 7, 2)
    assert manifest.splits["train"].documents + manifest.splits["heldout"].documents == 195
    assert caplog.messages[0].startswith(f"broken record left out: {file}:198: not JSON with one object per line: ")
    assert len(caplog.messages) == 5
    with pytest.raises(UserError, match=r"7 of 204 records .* max_broken_fraction 0\.034 allows"):
        prepare(str(file), tmp_path / "strict", max_broken_fraction=0.034, **options)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"]
    write_jsonl(file, make_texts(0, 195))
    prepare(str(file), tmp_path / "strict", max_broken_fraction=0.0, **options)  # none broken is within a limit of none


def test_every_damaged_file_is_named(tmp_path, caplog):
    """Each counts as one broken record; how much a file holds after the damage is unknown."""
    folder = tmp_path / "source"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", make_texts(0, 800))
    with (folder / "a.jsonl").open("a") as stream:
        stream.write("nonsense\n" * 6)
    whole = gzip.compress((folder / "a.jsonl").read_bytes())
    (folder / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "c.txt.gz").write_bytes(whole[: len(whole) // 2])
    table = pyarrow.table({"text": ["a" * 500 + str(i) for i in range(900)]})
    parquet.write_table(table, folder / "d.parquet", use_dictionary=False, compression="snappy")
    damaged = bytearray((folder / "d.parquet").read_bytes())
    damaged[2000:2200] = b"\xff" * 200
    (folder / "d.parquet").write_bytes(damaged)
    manifest = prepare(str(folder), tmp_path / "data", tokenizer="bytes", workers=1)
    assert manifest.records.broken == 9
    named = [message.removeprefix("broken record left out: ").split(":")[0] for message in caplog.messages]
    assert named == [str(folder / name) for name in (*["a.jsonl"] * 5, "b.jsonl.gz", "c.txt.gz", "d.parquet")]
    assert caplog.messages[6].endswith("c.txt.gz: damaged .gz file: it is truncated")


def test_a_pipe_is_read_once(tmp_path):
    """Training a tokenizer would read it a second time, and either wait for it or find it empty."""
    reader, writer = os.pipe()
    os.write(writer, "@@".join(make_texts(0, 50)).encode())
    os.close(writer)
    options = {"document_separator": "@@", "block_length": 64, "heldout_fraction": 0.3, "workers": 1}
    with pytest.raises(UserError, match="can be read only once"):
        prepare(f"/dev/fd/{reader}", tmp_path / "bpe", vocab_size=300, **options)
    assert prepare(f"/dev/fd/{reader}", tmp_path / "data", tokenizer="bytes", **options).records.read == 50
    os.close(reader)


@pytest.mark.parametrize(
    "content, key",
    [
        ("one document|", "none of 1 documents .* two different documents"),
        ("one document", r"document_separator '\|' is nowhere in"),
        ("same|same|same", "none of 3 documents .* two different documents"),
        ("||", "has no text: all of its 3 documents are empty"),
        ("", "has no text: all of its 1 documents are empty"),
    ],
)
def test_too_few_documents_are_refused(tmp_path, content, key):
    (tmp_path / "a.txt").write_text(content)
    options = {"tokenizer": "bytes", "workers": 1, "document_separator": "|"}
    with pytest.raises(UserError, match=key):
        prepare(str(tmp_path / "a.txt"), tmp_path / "data", heldout_fraction=1e-9, **options)
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_the_proposed_fraction_works(prepared, fraction):
    with pytest.raises(UserError, match=r"--heldout_fraction=0\.\d+$") as raised:
        prepared(make_texts(0, 5), heldout_fraction=fraction)
    _, manifest = prepared(make_texts(0, 5), heldout_fraction=float(str(raised.value).rpartition("=")[2]))
    assert all(split.documents >= 1 for split in manifest.splits.values())


@pytest.mark.parametrize(
    "options, key",
    [
        ({"heldout_fraction": 0.0}, "heldout_fraction must be between 0 and 1"),
        ({"heldout_fraction": 1.0}, "heldout_fraction must be between 0 and 1"),
        ({"max_broken_fraction": 2.0}, "max_broken_fraction must be between 0 and 1"),
        ({"block_length": 0}, "block_length must be at least 1"),
        ({"block_length": 10**11}, "block_length must be at most 16777216"),
        ({"vocab_size": 10**9}, "vocab_size must be at most 16777216"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"train_bytes": 0}, "train_bytes must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"vocab_size": 256}, "256 tokens; it must have at least 257"),
        ({"vocab_size": 0}, "cannot have 0 tokens"),
        ({"tokenizer": "bytes", "vocab_size": 300}, "vocab_size is for a trained tokenizer"),
        ({"tokenizer": "bytes", "train_bytes": 3}, "train_bytes is for a tokenizer that is trained"),
        ({"document_token": "</s>"}, "bpe has its own"),
        ({"text_field": "body"}, "no field 'body'"),
    ],
)
def test_bad_arguments_leave_nothing_behind(tmp_path, options, key):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 10))
    with pytest.raises(UserError, match=key):
        prepare(**{"source": source, "output": tmp_path / "data", **options})
    assert os.listdir(tmp_path) == ["a.jsonl"]
