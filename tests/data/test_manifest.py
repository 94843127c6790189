"""An incomplete dataset is refused by name."""

import json

import pytest

from jaxlinear.data import prepare, read_manifest
from jaxlinear.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "a.txt").write_text("|".join(f"document number {i}" for i in range(100)))
    prepare(
        str(tmp_path / "a.txt"),
        tmp_path / "data",
        tokenizer="bytes",
        document_separator="|",
        heldout_fraction=0.3,
        block_length=64,
    )
    return tmp_path / "data"


def edit(dataset, **changes):
    fields = json.loads((dataset / "manifest.json").read_text())
    (dataset / "manifest.json").write_text(json.dumps({**fields, **changes}))


def test_written_and_read_is_the_same(dataset, tmp_path):
    manifest = read_manifest(dataset)
    assert (manifest.vocab_size, manifest.dtype, manifest.document_token) == (257, "uint16", 256)
    assert (manifest.tokenizer.kind, manifest.tokenizer.file, len(manifest.tokenizer.sha256)) == ("bytes", None, 64)
    assert manifest.source == str(tmp_path / "a.txt") and manifest.records.read == 100
    (dataset / "copy").mkdir()
    manifest.write(dataset / "copy")
    assert (dataset / "copy/manifest.json").read_bytes() == (dataset / "manifest.json").read_bytes()


def test_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"no dataset at .*/absent: the directory does not exist"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(UserError, match=r"is not a prepared dataset: it has no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "splits": 3}']
)
def test_damaged_manifest(dataset, content):
    (dataset / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: .*; prepare the dataset again"):
        read_manifest(dataset)


def test_unknown_field_and_version(dataset):
    edit(dataset, surprise=1)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: .*surprise"):
        read_manifest(dataset)
    edit(dataset, format_version=2)
    with pytest.raises(UserError, match=r"has format version 2, but this program reads 1; prepare the dataset again"):
        read_manifest(dataset)


def test_missing_and_cut_shards(dataset):
    shard = dataset / "train/00000.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    message = rf"00000\.array_record is damaged: {len(content) - 1} bytes instead of {len(content)}"
    with pytest.raises(UserError, match=message):
        read_manifest(dataset)
    shard.unlink()
    with pytest.raises(UserError, match=r"is incomplete: shard train/00000\.array_record is missing"):
        read_manifest(dataset)


def test_wrong_number_of_blocks(dataset):
    splits = json.loads((dataset / "manifest.json").read_text())["splits"]
    splits["train"]["blocks"] += 1
    edit(dataset, splits=splits)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: its shards hold \d+ blocks, not \d+"):
        read_manifest(dataset)
