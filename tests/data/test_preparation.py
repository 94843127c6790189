"""Preparation: lossless, split without overlap, independent of the workers."""

import contextlib
import gzip
import json
import lzma
import multiprocessing
import os
import pathlib

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from jaxlinear.data import encoding, load_tokenizer, preparation, prepare, read_manifest
from jaxlinear.data.blocks import SplitReader, decode_block
from jaxlinear.data.sources import Record, Source, open_source
from jaxlinear.data.splitting import Splitter
from jaxlinear.data.tokenizer import BytesTokenizer
from jaxlinear.errors import RunError, UserError
from tests.data.sources_of_text import files, make_texts, write_jsonl


def read_documents(dataset, split) -> list[np.ndarray]:
    """The documents of a split as its blocks have them, each [T] with its document token."""
    manifest = read_manifest(dataset)
    info, length = manifest.splits[split], manifest.block_length
    stream, starts = np.zeros(info.tokens, np.int64), []
    for k, record in enumerate(SplitReader(dataset, info).read(range(info.blocks))):
        valid, tokens, positions = decode_block(record, length, np.dtype(manifest.dtype))
        stream[k * length : k * length + valid] = tokens[:valid]
        starts += (k * length + positions).tolist()
    assert starts == np.flatnonzero(stream == manifest.document_token).tolist()
    return np.split(stream, starts[1:])


@pytest.fixture
def pipe():
    """A function that makes a pipe holding the given bytes and returns its name."""
    ends = []

    def make(content: bytes) -> str:
        reader, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
        ends.append(reader)
        return f"/dev/fd/{reader}"

    yield make
    for end in ends:
        os.close(end)


def read_texts(dataset, split) -> list[str]:
    tokenizer = load_tokenizer(dataset)
    documents = read_documents(dataset, split)
    assert all(document[0] == tokenizer.document_token for document in documents)
    return [tokenizer.decode(document[1:]) for document in documents]


def sentencepiece_model(directory) -> str:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def return x for while the of and"] * 20),
        model_prefix=str(directory / "tiny"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(directory / "tiny.model")


def json_tokenizer(directory) -> str:
    prepare(write_jsonl(directory / "other.jsonl", make_texts(5, 50)), directory / "other", vocab_size=290, workers=1)
    return str(directory / "other/tokenizer.json")


@pytest.mark.parametrize("kind", ["bpe", "bytes", "json", "sentencepiece"])
def test_text_to_tokens_to_text(tmp_path, kind):
    texts = make_texts(0, 120)
    options = {"bpe": {"vocab_size": 400}, "bytes": {"tokenizer": "bytes"}}.get(kind)
    if kind == "json":
        options = {"tokenizer": json_tokenizer(tmp_path)}
    elif kind == "sentencepiece":
        texts = [text.replace("▁", "_") for text in texts]  # SentencePiece's own sign for a space
        options = {"tokenizer": sentencepiece_model(tmp_path)}
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare(source, tmp_path / "data", heldout_fraction=0.2, block_length=128, workers=1, **options)
    train, heldout = read_texts(tmp_path / "data", "train"), read_texts(tmp_path / "data", "heldout")
    splitter = Splitter(0, 0.2)
    assert train == [text for text in texts if splitter.split(text.encode()) == "train"]
    assert heldout == [text for text in texts if splitter.split(text.encode()) == "heldout"]
    assert 10 <= len(heldout) <= 40
    for name, part in (("train", train), ("heldout", heldout)):
        split = manifest.splits[name]
        assert (split.documents, split.bytes) == (len(part), sum(len(text.encode()) for text in part))
    assert manifest == read_manifest(tmp_path / "data")
    content = "".join(heldout).encode()
    assert manifest.splits["heldout"].gzip_bytes == len(gzip.compress(content, 9))
    assert manifest.splits["heldout"].xz_bytes == len(lzma.compress(content, preset=9))
    assert manifest.splits["train"].gzip_bytes is None


def test_a_tokenizer_that_changes_text_is_warned_of(tmp_path, caplog):
    fields = json.loads(pathlib.Path(json_tokenizer(tmp_path)).read_text())
    assert not caplog.records
    (tmp_path / "lower.json").write_text(json.dumps(fields | {"normalizer": {"type": "Lowercase"}}))
    source = write_jsonl(tmp_path / "a.jsonl", [f"Of {i} words" for i in range(50)] + [f"of {i}" for i in range(50)])
    manifest = prepare(
        source, tmp_path / "data", tokenizer=str(tmp_path / "lower.json"), heldout_fraction=0.3, workers=1
    )
    changed = sum(text.startswith("of") and text.endswith("words") for text in read_texts(tmp_path / "data", "heldout"))
    assert 5 < changed < manifest.splits["heldout"].documents
    (record,) = caplog.records
    said = f"{changed} of {manifest.splits['heldout'].documents} held-out documents differ from what their tokens decode to"
    assert record.getMessage().startswith(said)


def test_vocabulary_above_16_bits_is_stored_in_32(tmp_path):
    file = json_tokenizer(tmp_path)
    fields = json.loads(pathlib.Path(file).read_text())
    fields["model"]["vocab"]["</s>"] = 70_000
    pathlib.Path(file).write_text(json.dumps(fields))
    texts = make_texts(0, 60)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare(
        source,
        tmp_path / "data",
        tokenizer=file,
        document_token="</s>",
        heldout_fraction=0.3,
        block_length=64,
        workers=1,
    )
    assert (manifest.dtype, manifest.vocab_size, manifest.document_token) == ("uint32", 70_001, 70_000)
    assert sorted(read_texts(tmp_path / "data", "train") + read_texts(tmp_path / "data", "heldout")) == sorted(texts)


def test_splits_share_no_document_even_when_documents_repeat(tmp_path):
    texts = make_texts(0, 60, longest=20) * 3
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(source, tmp_path / "data", tokenizer="bytes", heldout_fraction=0.3, block_length=64, workers=1)
    train, heldout = read_texts(tmp_path / "data", "train"), read_texts(tmp_path / "data", "heldout")
    assert len(train) + len(heldout) == 180 and len(set(heldout)) * 3 == len(heldout) >= 30
    assert set(train) & set(heldout) == set()


def test_seed_chooses_the_split(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60, longest=20))
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "block_length": 64, "workers": 1}
    for seed in (0, 1):
        manifest = prepare(source, tmp_path / str(seed), seed=seed, **options)
        assert (manifest.seed, manifest.heldout_fraction) == (seed, 0.3)  # the warning about mixtures reads them
    assert read_texts(tmp_path / "0", "heldout") != read_texts(tmp_path / "1", "heldout")


def test_workers_and_repetition_change_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 16)  # so many batches that they can overtake each other
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 300))
    options = {"vocab_size": 400, "heldout_fraction": 0.2, "block_length": 128}
    for name, workers in (("one", 1), ("three", 3), ("again", 1)):
        prepare(source, tmp_path / name, workers=workers, **options)
    one = files(tmp_path / "one")
    assert sorted(one) == [
        "heldout/00000.array_record",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_info.json",
        "train/00000.array_record",
    ]
    assert files(tmp_path / "three") == one
    assert files(tmp_path / "again") == one


def test_little_of_the_source_is_read_ahead(tmp_path, monkeypatch):
    """Even if documents are consumed slowly: a source may be larger than memory."""
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 1)
    tokenizer, read = BytesTokenizer(), []
    tokenizer.save(tmp_path)

    def given():
        for i in range(200):
            read.append(i)
            yield str(i)

    with contextlib.closing(encoding.encode_in_order(given(), tokenizer, tmp_path, 2)) as encoded:
        for i, (text, tokens) in zip(range(20), encoded, strict=False):
            assert text == str(i) and tokens.tolist() == list(text.encode())
            assert len(read) <= i + 8


def test_a_worker_that_is_killed_is_an_error_with_its_likely_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 1)
    tokenizer = BytesTokenizer()
    tokenizer.save(tmp_path)

    def given():
        for i in range(200):
            if i == 20:
                for child in multiprocessing.active_children():
                    child.kill()
                    child.join()
            yield str(i)

    with pytest.raises(RunError, match="an encoding process was killed, probably for lack of memory; fewer "):
        list(encoding.encode_in_order(given(), tokenizer, tmp_path, 2))


def test_tokenizer_is_trained_on_the_training_split_only(tmp_path):
    splitter = Splitter(0, 0.3)
    plain = [text for text in make_texts(0, 200) if splitter.split(text.encode()) == "train"]
    marked = [text for i in range(100) if splitter.split((text := f"{i} unmistakable").encode()) == "heldout"]
    assert len(plain) > 100 and len(marked) > 20
    source = write_jsonl(tmp_path / "a.jsonl", [*marked, *plain])
    prepare(source, tmp_path / "data", vocab_size=1000, heldout_fraction=0.3, workers=1)
    assert read_texts(tmp_path / "data", "heldout") == marked
    vocabulary = json.loads((tmp_path / "data/tokenizer.json").read_text())["model"]["vocab"]
    assert any("return" in token for token in vocabulary)
    assert not any("mis" in token for token in vocabulary)


def test_sample_for_the_tokenizer_is_bounded(tmp_path):
    texts = [f"word{i} " * 400 for i in range(200)]
    prepare(
        write_jsonl(tmp_path / "a.jsonl", texts),
        tmp_path / "data",
        vocab_size=3000,
        train_bytes=50_000,
        heldout_fraction=0.3,
        workers=1,
    )
    vocabulary = json.loads((tmp_path / "data/tokenizer.json").read_text())["model"]["vocab"]
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


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_compressed_source_is_sampled_as_what_it_holds(tmp_path, pack):
    """Going only by the size of its files, the whole sample would come from the beginning."""
    texts = [f"{i:03d}" + "é" * 498 + "." for i in range(400)]  # of 1000 bytes each
    name = {bytes: "a.jsonl", gzip.compress: "a.jsonl.gz"}.get(pack, "a.jsonl.zst")
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / name).write_bytes(pack("".join(lines).encode()))
    source = open_source(str(tmp_path / name))
    assert source.size == pytest.approx(400_000, rel=0.05)
    sample = list(preparation._training_sample(source, Splitter(0, 0.05), 40_000, 0))
    numbers = [int(text[:3]) for text in sample]
    assert 30 <= len(numbers) <= 40 and numbers[-1] > 300 and 120 < np.mean(numbers) < 280


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
    named = [record.getMessage() for record in caplog.records]
    assert named[0] == (
        f"broken record left out: {file}:198: not JSON with one object per line: Expecting value: line 1 column 1 (char 0)"
    )
    assert len(named) == 5
    message = r"7 of 204 records of .*a\.jsonl are broken, more than max_broken_fraction 0\.034 allows"
    with pytest.raises(UserError, match=message):
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
    named = [record.getMessage().removeprefix("broken record left out: ") for record in caplog.records]
    assert [message.split(":")[0] for message in named[:5]] == [str(folder / "a.jsonl")] * 5
    assert [message.split(":")[0] for message in named[5:]] == [
        str(folder / name) for name in ("b.jsonl.gz", "c.txt.gz", "d.parquet")
    ]
    assert named[6].endswith("c.txt.gz: damaged .gz file: it is truncated")


def test_a_pipe_is_read_once(tmp_path, pipe):
    """Training a tokenizer would read it a second time, and either wait for it or find it empty."""
    content = "@@".join(make_texts(0, 50)).encode()
    options = {"document_separator": "@@", "block_length": 64, "heldout_fraction": 0.3, "workers": 1}
    manifest = prepare(pipe(content), tmp_path / "data", tokenizer="bytes", **options)
    assert manifest.records.read == 50
    with pytest.raises(UserError, match=r"is a pipe, which can be read only once, .* or give an existing --tokenizer"):
        prepare(pipe(content), tmp_path / "bpe", vocab_size=300, **options)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "one document|",
            r"the heldout split would be empty: none of 1 documents .* the splits need two different documents",
        ),
        ("one document", r"^document_separator '\|' is nowhere in .*a\.txt; leave it out if each is one document$"),
        ("same|same|same", "would be empty: none of 3 documents .* the splits need two different documents"),
        ("||", r"a\.txt has no text: all of its 3 documents are empty"),
        ("", r"a\.txt has no text: all of its 1 documents are empty"),
    ],
)
def test_too_few_documents_are_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_text(content)
    options = {"tokenizer": "bytes", "workers": 1, "document_separator": "|"}
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / "a.txt"), tmp_path / "data", heldout_fraction=1e-9, **options)
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_the_proposed_fraction_works(tmp_path, fraction):
    (tmp_path / "a.txt").write_text("|".join(make_texts(0, 5)))
    options = {"tokenizer": "bytes", "workers": 1, "document_separator": "|"}
    with pytest.raises(UserError, match=r"--heldout_fraction=0\.\d+$") as raised:
        prepare(str(tmp_path / "a.txt"), tmp_path / "data", heldout_fraction=fraction, **options)
    proposed = float(str(raised.value).rpartition("=")[2])
    manifest = prepare(str(tmp_path / "a.txt"), tmp_path / "data", heldout_fraction=proposed, **options)
    assert all(split.documents >= 1 for split in manifest.splits.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heldout_fraction": 0.0}, "heldout_fraction must be between 0 and 1, not 0.0"),
        ({"heldout_fraction": 1.0}, "heldout_fraction must be between 0 and 1, not 1.0"),
        ({"max_broken_fraction": 2.0}, "max_broken_fraction must be between 0 and 1, not 2.0"),
        ({"block_length": 0}, "block_length must be at least 1, not 0"),
        ({"block_length": 10**11}, "block_length must be at most 16777216, not 100000000000"),
        ({"vocab_size": 10**9}, "vocab_size must be at most 16777216, not 1000000000"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"train_bytes": 0}, "train_bytes must be at least 1, not 0"),
        ({"seed": -1}, r"seed must be at least 0 and below 2\*\*63, not -1"),
        ({"vocab_size": 100}, "a byte-level BPE cannot have 100 tokens"),
        (
            {"tokenizer": "bytes", "vocab_size": 300},
            r"vocab_size is for a trained tokenizer \(bpe\); bytes has its own",
        ),
        ({"vocab_size": 0}, "a byte-level BPE cannot have 0 tokens"),
        (
            {"tokenizer": "bytes", "train_bytes": 3},
            r"train_bytes is for a tokenizer that is trained \(bpe\); bytes is not",
        ),
        ({"document_separator": "|"}, r"^document_separator does nothing for .*a\.jsonl: it is for plain text; leave"),
        ({"suffixes": (".foo",)}, r"^suffixes does nothing for .*a\.jsonl: it is for a folder; leave it out"),
        ({"document_token": "</s>"}, "document_token is for an existing tokenizer; bpe has its own"),
        ({"tokenizer": "nonesuch"}, "no tokenizer 'nonesuch': give bpe, bytes, or the path"),
        ({"source": "nowhere"}, "no source 'nowhere'"),
        ({"text_field": "body"}, r"no field 'body' \(its fields: text\); --text_field chooses"),
    ],
)
def test_bad_arguments_leave_nothing_behind(tmp_path, options, message):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 10))
    options = {"source": source, "output": tmp_path / "data", **options}
    with pytest.raises(UserError, match=message):
        prepare(**options)
    assert os.listdir(tmp_path) == ["a.jsonl"]
