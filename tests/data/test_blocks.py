"""Packing a stream into blocks: every token and boundary is where the stream has it, with any number of shards."""

import numpy as np
import pytest

from jaxlinear.data import blocks
from jaxlinear.data.blocks import SplitReader, SplitWriter, decode_block, encode_block, token_dtype
from jaxlinear.errors import UserError

DOCUMENT = 9


def write(directory, documents, block_length=8, dtype="uint16"):
    writer = SplitWriter(directory, "train", block_length=block_length, dtype=dtype, document_token=DOCUMENT)
    for document in documents:
        writer.add(np.array(document), len(document))
    return writer.finish()


def random_documents(seed, count, longest):
    random = np.random.default_rng(seed)
    return [random.integers(0, 9, random.integers(0, longest)).tolist() for _ in range(count)]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_block_round_trip(dtype):
    tokens, starts = np.array([9, 70 if dtype == "uint16" else 70000, 9, 5]), np.array([0, 2])
    record = encode_block(tokens, starts, 6, dtype)
    assert len(record) == 8 + 7 * np.dtype(dtype).itemsize + 8
    valid, decoded, decoded_starts = decode_block(record, 6, np.dtype(dtype))
    assert valid == 4
    assert decoded.tolist() == [*tokens.tolist(), 0, 0, 0]
    assert decoded_starts.tolist() == [0, 2]
    with pytest.raises(ValueError, match=f"a record of {len(record) - 1} bytes instead of {len(record)}"):
        decode_block(record[:-1], 6, np.dtype(dtype))


def test_token_dtype():
    assert [token_dtype(n) for n in (257, 1 << 16, (1 << 16) + 1)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize("count, longest", [(1, 2), (3, 4), (40, 30), (200, 3), (3, 200)])
def test_blocks_hold_the_stream(tmp_path, count, longest):
    documents = random_documents(count, count, longest)
    split = write(tmp_path, documents)
    stream = [token for document in documents for token in [DOCUMENT, *document]]
    boundaries = np.cumsum([0, *(1 + len(document) for document in documents)])[:-1].tolist()
    assert (split.documents, split.tokens, split.bytes) == (count, len(stream), len(stream) - count)
    assert split.blocks == -(-(len(stream) - 1) // 8)
    found = []
    for k, record in enumerate(SplitReader(tmp_path, split).read(range(split.blocks))):
        valid, tokens, starts = decode_block(record, 8, np.dtype("uint16"))
        expected = stream[8 * k : 8 * k + 9]
        assert (valid, tokens[:valid].tolist(), tokens[valid:].any()) == (len(expected), expected, False)
        found += (8 * k + starts).tolist()
    # A boundary at the very last token may lie after the last block, where there is no input.
    assert found == [boundary for boundary in boundaries if boundary < 8 * split.blocks]


def test_shards_are_read_in_the_order_asked_for(tmp_path, monkeypatch):
    documents = random_documents(0, 60, 40)
    (tmp_path / "one").mkdir()
    whole = write(tmp_path / "one", documents)
    monkeypatch.setattr(blocks, "RECORDS_PER_SHARD", 7)
    monkeypatch.setattr(blocks, "_OPEN_SHARDS", 3)
    split = write(tmp_path, documents)
    assert [shard.records for shard in split.shards[:-1]] == [7] * (len(split.shards) - 1) and len(split.shards) > 10
    assert split.shards[1].file == "train/00001.array_record"
    order = np.random.default_rng(0).permutation(split.blocks)
    reader = SplitReader(tmp_path, split)
    assert reader.read(order) == SplitReader(tmp_path / "one", whole).read(order)
    assert reader.read([3, 3, 0]) == [reader.read([i])[0] for i in (3, 3, 0)]
    assert len(reader._open) == 3


def test_a_dataset_that_is_prepared_anew_while_it_is_read(tmp_path, monkeypatch):
    """Its new shards have the same names and, but for the last, as many blocks."""
    monkeypatch.setattr(blocks, "RECORDS_PER_SHARD", 7)
    manifest = tmp_path / blocks.MANIFEST
    manifest.write_text("of the first")
    split = write(tmp_path, random_documents(0, 60, 40))
    reader = SplitReader(tmp_path, split)
    before = reader.read([0, 1])
    manifest.write_text("of the first")  # as a copy in the same place
    reader.read([7])
    (tmp_path / "train").rename(tmp_path / "old")
    write(tmp_path, random_documents(1, 60, 90))
    manifest.write_text("of another")
    assert reader.read([0, 1]) == before  # from the file that was open
    with pytest.raises(UserError, match=f"the dataset in {tmp_path} was replaced by a new one while it was being read"):
        reader.read([14])


def test_damage_is_named(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", random_documents(1, 20, 10))
    split = write(tmp_path, [random.integers(0, 1 << 16, 4000) for _ in range(50)], block_length=2048)
    file = tmp_path / "train/00000.array_record"
    content = bytearray(file.read_bytes())
    content[100_000:101_000] = bytes(1000)
    of_another = (tmp_path / "other/train/00000.array_record").read_bytes()
    damaged = r"00000\.array_record is damaged: it holds {} blocks instead of " + str(split.blocks)
    for found, key in (
        (content, r"shard .*00000\.array_record cannot be read: .*hash mismatch"),
        (b"", damaged.format(0)),
        (of_another, damaged.format(r"\d+")),
    ):
        file.write_bytes(found)
        with pytest.raises(UserError, match=key):
            SplitReader(tmp_path, split).read(range(split.blocks))
