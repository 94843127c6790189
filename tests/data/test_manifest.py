"""An incomplete dataset is refused by name."""

import json

import pytest

from jaxlinear.data import prepare, read_manifest
from jaxlinear.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "a.txt").write_text("|".join(f"document number {i}" for i in range(100)))
    options = {"tokenizer": "bytes", "document_separator": "|", "heldout_fraction": 0.3, "block_length": 64}
    prepare(str(tmp_path / "a.txt"), tmp_path / "data", **options)
    return tmp_path / "data"


def refused(dataset, key) -> None:
    with pytest.raises(UserError, match=key):
        read_manifest(dataset)


def test_no_dataset(tmp_path):
    refused(tmp_path / "absent", "no dataset at .*/absent: the directory does not exist")
    refused(tmp_path, r"it has no manifest\.json")


def test_damaged_manifest(dataset):
    file = dataset / "manifest.json"
    fields = json.loads(file.read_text())
    splits = json.loads(file.read_text())["splits"]
    splits["train"]["blocks"] += 1
    for content in ("", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "splits": 3}'):
        file.write_text(content)
        refused(dataset, r"manifest\.json is damaged: .*; prepare the dataset again")
    for changes, key in (
        ({"surprise": 1}, r"manifest\.json is damaged: .*surprise"),
        ({"format_version": 2}, "has format version 2, but this program reads 1"),
        ({"splits": splits}, r"manifest\.json is damaged: its shards hold \d+ blocks, not \d+"),
    ):
        file.write_text(json.dumps(fields | changes))
        refused(dataset, key)


def test_missing_and_truncated_shards(dataset):
    shard = dataset / "train/00000.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(dataset, rf"00000\.array_record is damaged: {len(content) - 1} bytes instead of {len(content)}")
    shard.unlink()
    refused(dataset, r"shard train/00000\.array_record is missing")
