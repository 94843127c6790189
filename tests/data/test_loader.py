"""The loader: a pure function of (seed, step), the same on any number of hosts, faithful to the stream."""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxlinear.data import TrainBatches, heldout_batches, loader, prepare, read_manifest
from jaxlinear.data.blocks import SplitReader, decode_block, encode_block
from jaxlinear.data.manifest import Shard
from jaxlinear.errors import UserError

REPOSITORY = pathlib.Path(__file__).parents[2]
L = 32


def make_dataset(directory, seed, characters, **options):
    """Bytes as tokens, in documents of 1 to 99 letters; ``characters`` tell the datasets apart."""
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list(characters), random.integers(1, 100))) + str(i) for i in range(200)]
    source = directory.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "block_length": L, "workers": 1, **options}
    prepare(str(source), directory, **options)
    return directory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("a") / "data", 0, "abcdefgh")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("b") / "data", 1, "ABCDEFGH")


def stream_and_segments(path, split) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N], number of the document of every token [N]) of a split, from the blocks."""
    manifest = read_manifest(path)
    info = manifest.splits[split]
    stream, starts = np.zeros(info.tokens, np.int32), np.zeros(info.tokens, np.int32)
    for k, record in enumerate(SplitReader(path, info).read(range(info.blocks))):
        valid, tokens, positions = decode_block(record, L, np.dtype(manifest.dtype))
        stream[k * L : k * L + valid] = tokens[:valid]
        starts[k * L + positions] = 1
    return stream, np.cumsum(starts)


def rows_of(batches) -> np.ndarray:
    """The tokens and last target of every row: [rows, T + 1]."""
    return np.concatenate([np.concatenate([batch["tokens"], batch["targets"][:, -1:]], axis=1) for batch in batches])


def assert_same(a, b):
    assert a.keys() == b.keys() == {"tokens", "targets", "segment_ids"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


@pytest.mark.parametrize("length", [4, 8, L, 3 * L])
def test_one_epoch_is_a_permutation_of_the_stream(dataset, length):
    stream, documents = stream_and_segments(dataset, "train")
    batches = TrainBatches(dataset, batch_size=4, sequence_length=length, seed=0)
    count = (len(stream) - 1) // length
    assert batches.examples_per_epoch == count
    assert batches.batches_per_epoch == count // 4 > 10
    assert batches.tokens_per_epoch == count * length
    found = []
    for step in range(count // 4):
        batch = batches[step]
        for tokens, targets, segments in zip(*batch.values(), strict=True):
            assert tokens.dtype == targets.dtype == segments.dtype == np.int32 and tokens.shape == (length,)
            # Find its place in the stream. Document numbers at the ends of the texts make all but short windows unique.
            (places,) = np.nonzero(np.all(np.lib.stride_tricks.sliding_window_view(stream, length) == tokens, axis=1))
            places = [p for p in places if p % length == 0 and p + length < len(stream)]
            places = [p for p in places if np.array_equal(stream[p + 1 : p + length + 1], targets)]
            expected = [documents[p : p + length] - documents[p] + 1 for p in places]
            assert any(np.array_equal(segments, e) for e in expected)
            if len(places) == 1:
                found.append(places[0] // length)
    assert len(set(found)) == len(found)
    if length >= L:
        assert len(found) == count // 4 * 4


def test_segments_start_at_document_tokens(dataset):
    batch = TrainBatches(dataset, batch_size=64, sequence_length=L, seed=0)[0]
    steps = np.diff(batch["segment_ids"], axis=1)
    np.testing.assert_array_equal(steps == 1, batch["tokens"][:, 1:] == 256)
    np.testing.assert_array_equal(batch["segment_ids"][:, 0], 1)
    assert set(np.unique(steps)) == {0, 1}
    # The end of a document is predicted by a target in that document, not in the next.
    ends = batch["targets"] == 256
    np.testing.assert_array_equal(ends[:, :-1], steps == 1)


def test_random_access_is_sequential_access(dataset):
    options = {"batch_size": 4, "sequence_length": L, "seed": 3}
    first = TrainBatches(dataset, **options)
    sequential = [first[step] for step in range(30)]
    again = TrainBatches(dataset, **options)
    for step in np.random.default_rng(0).permutation(30).tolist():
        assert_same(again[step], sequential[step])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 1, 2, 6)])
def test_hosts_together_have_the_batch(dataset, other, mixed, cuts):
    paths = {str(dataset): 0.5, str(other): 0.5} if mixed else dataset
    options = {"batch_size": 6, "sequence_length": 2 * L, "seed": 0}
    whole = TrainBatches(paths, **options)
    hosts = [TrainBatches(paths, rows=range(*rows), **options) for rows in itertools.pairwise(cuts)]
    for step in (0, 7, 1000):
        parts = [host[step] for host in hosts]
        assert_same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, whole[step])


@pytest.mark.parametrize("mixed", [False, True])
def test_the_rows_of_a_host_need_not_be_neighbours(dataset, other, mixed):
    paths = {str(dataset): 0.5, str(other): 0.5} if mixed else dataset
    options = {"batch_size": 6, "sequence_length": 2 * L}
    rows = [0, 2, 3, 5]
    whole, host = (TrainBatches(paths, seed=0, rows=some, **options) for some in (None, rows))
    for step in (0, 7, 1000):
        assert_same(host[step], {name: values[rows] for name, values in whole[step].items()})
    heldout, of_host = (list(heldout_batches(dataset, rows=some, **options)) for some in (None, rows))
    for got, batch in zip(of_host, heldout, strict=True):
        assert_same(got, {name: values[rows] for name, values in batch.items()})


def test_global_order_does_not_depend_on_the_batch_size(dataset):
    small = TrainBatches(dataset, batch_size=2, sequence_length=L, seed=0)
    large = TrainBatches(dataset, batch_size=10, sequence_length=L, seed=0)
    np.testing.assert_array_equal(rows_of(small[i] for i in range(50)), rows_of(large[i] for i in range(10)))


def test_epochs_hold_the_same_rows_in_another_order(dataset):
    count = TrainBatches(dataset, batch_size=1, sequence_length=L, seed=0).examples_per_epoch
    batches = TrainBatches(dataset, batch_size=1, sequence_length=L, seed=0)
    first, second = (rows_of(batches[e * count + i] for i in range(count)) for e in (0, 1))
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))
    assert np.mean(np.all(first == second, axis=1)) < 0.1
    stream, _ = stream_and_segments(dataset, "train")
    in_order = np.lib.stride_tricks.sliding_window_view(stream, L + 1)[::L]
    assert sorted(map(bytes, first)) == sorted(map(bytes, np.ascontiguousarray(in_order)))
    assert np.mean(np.all(first == in_order, axis=1)) < 0.1


def test_seeds_give_other_orders(dataset):
    rows = [
        rows_of(TrainBatches(dataset, batch_size=8, sequence_length=L, seed=s)[i] for i in range(5)) for s in (0, 1)
    ]
    assert np.mean(np.all(rows[0] == rows[1], axis=1)) < 0.1
    # Nor is the second epoch of one seed the first epoch of the next.
    count = TrainBatches(dataset, batch_size=1, sequence_length=L, seed=0).examples_per_epoch
    batches = [TrainBatches(dataset, batch_size=1, sequence_length=L, seed=s) for s in (0, 1)]
    second = rows_of(batches[0][count + i] for i in range(40))
    assert np.mean(np.all(second == rows_of(batches[1][i] for i in range(40)), axis=1)) < 0.1


def test_the_order_is_what_it_was():
    """If this fails, a resumed run sees different batches from those that the stopped run would have seen.

    After a deliberate change, or an unavoidable update of grain, put the new numbers here and say so in the release notes.
    """
    order, epoch = loader._order([1000], [1.0], 0)
    assert [order[i] for i in (0, 1, 2, 999, 1000, 123456)] == [247, 231, 907, 977, 747, 26]
    assert epoch == 1000
    order, epoch = loader._order([1000, 500], [3, 1], 7)
    assert [order[i] for i in (0, 1, 2, 3, 4, 5, 123456)] == [238, 880, 942, 1023, 155, 406, 928]
    assert epoch == 1333


@pytest.mark.parametrize("size", [1 << 16, 10**6, 10**9])
def test_examples_in_a_row_are_from_all_over_the_text(size):
    """If neighbouring examples came from similar places, a batch of sorted text would come from a few parts of it. With the
    four rounds of grain's own shuffle, the first of these correlations is -0.37, 0.38 and 0.57 at distances up to 64."""
    order, _ = loader._order([size], [1.0], 0)
    epochs = [np.array([order[e * size + i] / size for i in range(8192)]) for e in range(2)]
    for distance in range(1, 65):
        for places in epochs:
            assert abs(np.corrcoef(places[distance:], places[:-distance])[0, 1]) < 0.06  # five standard deviations
    assert abs(np.corrcoef(*epochs)[0, 1]) < 0.06


@pytest.mark.parametrize("weights", [(0.75, 0.25), (3, 1)])
def test_mixture_has_its_proportions(dataset, other, weights):
    paths = dict(zip((str(dataset), str(other)), weights, strict=True))
    batches = TrainBatches(paths, batch_size=8, sequence_length=L, seed=0)
    rows = rows_of(batches[i] for i in range(100))
    # Capitals belong to the second dataset. A row can be all digits and document tokens, but not one of 32 tokens.
    second = np.any((rows >= ord("A")) & (rows <= ord("H")), axis=1)
    first = np.any((rows >= ord("a")) & (rows <= ord("h")), axis=1)
    assert not np.any(first & second)
    assert second.sum() == pytest.approx(200, abs=2)
    assert np.all([7 >= s >= 1 for s in second.reshape(100, 8).sum(axis=1)])  # spread, not in runs
    assert_same(TrainBatches(paths, batch_size=8, sequence_length=L, seed=0)[57], batches[57])
    # The epoch of the mixture ends with the dataset that is exhausted first.
    counts = [TrainBatches(p, batch_size=1, sequence_length=L, seed=0).examples_per_epoch for p in paths]
    assert batches.examples_per_epoch == pytest.approx(min(counts[0] / 0.75, counts[1] / 0.25), abs=1)


@pytest.mark.parametrize(
    "weights, shares",
    [
        ((0.7, 0.3), (7, 3)),
        ((0.5, 0.497), (500, 497)),
        ((0.29, 0.29, 0.42), (29, 29, 42)),
        ((np.float64(0.1), 1, 1e-3, 0.2), (100, 1000, 1, 200)),
    ],
)
def test_shares_of_a_mixture_are_exact(weights, shares):
    """With weights rounded to hundredths of the smallest, 0.5 and 0.497 would be 1 to 1, and 0.7 and 0.3 233 to 100."""
    period, size = sum(shares), 10**6
    order, epoch = loader._order([size] * len(shares), weights, 0)
    assert epoch == size * period // max(shares)
    which = np.array([order[i] // size for i in range(2 * period)])
    of_each = np.cumsum(which[:, None] == np.arange(len(shares)), axis=0)
    np.testing.assert_array_equal(of_each[period - 1], shares)
    np.testing.assert_array_equal(of_each[-1], 2 * np.array(shares))
    expected = np.arange(1, 2 * period + 1)[:, None] * np.array(shares) / period
    assert np.abs(of_each - expected).max() < len(shares)
    far = 10**15 * period  # in examples: no sum is rounded there either
    np.testing.assert_array_equal([order[i] // size for i in range(far, far + 20)], which[:20])


def test_mixture_shows_each_dataset_in_whole_epochs(dataset, other):
    batches = TrainBatches({str(dataset): 1, str(other): 1}, batch_size=2, sequence_length=L, seed=0)
    count = TrainBatches(other, batch_size=1, sequence_length=L, seed=0).examples_per_epoch
    rows = rows_of(batches[i] for i in range(count))
    of_other = rows[~np.any((rows >= ord("a")) & (rows <= ord("h")), axis=1)]
    stream, _ = stream_and_segments(other, "train")
    in_order = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(stream, L + 1)[::L])
    assert sorted(map(bytes, of_other)) == sorted(map(bytes, in_order))


def test_epochs_end(dataset):
    batches = TrainBatches(dataset, batch_size=7, sequence_length=L, seed=0, epochs=2)
    assert batches.num_batches == 2 * batches.examples_per_epoch // 7
    assert len(list(batches)) == batches.num_batches
    for step in (batches.num_batches, -1):
        with pytest.raises(IndexError, match=f"no batch {step} among {batches.num_batches}"):
            batches[step]
    assert TrainBatches(dataset, batch_size=7, sequence_length=L, seed=0).num_batches is None


@pytest.mark.parametrize("split", ["heldout", "train"])
@pytest.mark.parametrize("length", [1, 4, L, 2 * L, 64 * L])
def test_heldout_has_every_target_once(dataset, split, length):
    stream, documents = stream_and_segments(dataset, split)
    batches = list(heldout_batches(dataset, batch_size=5, sequence_length=length, split=split))
    assert all(batch["tokens"].shape == (5, length) and batch["tokens"].dtype == np.int32 for batch in batches)
    tokens, targets, segments = (
        np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "targets", "segment_ids")
    )
    real = segments > 0
    np.testing.assert_array_equal(targets[real], stream[1:])
    np.testing.assert_array_equal(tokens[real], stream[:-1])
    assert not tokens[~real].any() and not targets[~real].any()
    # Padding is only at the end, and shorter than a batch.
    np.testing.assert_array_equal(np.flatnonzero(real), np.arange(len(stream) - 1))
    assert (~real).sum() < 5 * length
    for row in range(-(-(len(stream) - 1) // length)):
        there = documents[row * length : (row + 1) * length][: real[row].sum()]
        np.testing.assert_array_equal(segments[row][real[row]], there - there[0] + 1)


def test_heldout_hosts_and_limit(dataset):
    options = {"batch_size": 6, "sequence_length": L}
    whole = list(heldout_batches(dataset, **options))
    hosts = [list(heldout_batches(dataset, rows=range(*rows), **options)) for rows in ((0, 2), (2, 6))]
    assert len(whole) == len(hosts[0]) == len(hosts[1]) > 3
    for i, batch in enumerate(whole):
        assert_same({name: np.concatenate([host[i][name] for host in hosts]) for name in batch}, batch)
    limited = list(heldout_batches(dataset, limit=2, **options))
    assert len(limited) == 2
    assert_same(limited[1], whole[1])


@pytest.fixture
def vast(dataset, tmp_path, monkeypatch):
    """2 ** 33 + 100 tokens in shards without content. Records are made as they are read: token j of block k is k + j."""
    manifest = read_manifest(dataset)
    tokens, per_shard, size = 2**33 + 100, 1 << 16, 5
    blocks = -(-(tokens - 1) // L)
    (tmp_path / "train").mkdir()
    shards = []
    for first in range(0, blocks, per_shard):
        name = f"train/{len(shards):05d}.array_record"
        (tmp_path / name).write_bytes(bytes(size))
        shards.append(Shard(name, min(per_shard, blocks - first), size))

    def read_shard(self, shard, positions):
        firsts = [shard * per_shard + position for position in positions]
        assert all(0 <= position < shards[shard].records for position in positions)
        starts = np.array([3, 20])
        return [encode_block(first + np.arange(L + 1), starts, L, "uint32") for first in firsts]

    monkeypatch.setattr(SplitReader, "_read_shard", read_shard)
    train = dataclasses.replace(
        manifest.splits["train"], tokens=tokens, documents=2 * blocks, blocks=blocks, shards=tuple(shards)
    )
    dataclasses.replace(manifest, dtype="uint32", splits={"train": train}).write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("length", [8, L, 4 * L])
def test_more_tokens_than_32_bits_count(vast, length):
    table = loader.ExampleTable(vast, "train", length)
    assert table.targets == 2**33 + 99 and table.whole_examples == (2**33 + 99) // length
    around = [2**31 // length - 1, 2**31 // length, 2**32 // length - 1, 2**32 // length, table.whole_examples - 1]
    batch = table.read(np.array(around))
    position = np.array(around)[:, None] * length + np.arange(length)
    np.testing.assert_array_equal(batch["tokens"], position // L + position % L)
    np.testing.assert_array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:])
    starts = np.isin(position % L, [3, 20])
    starts[:, 0] = True
    np.testing.assert_array_equal(batch["segment_ids"], np.cumsum(starts, axis=1))
    batches = TrainBatches(vast, batch_size=4, sequence_length=length, seed=0)
    assert batches.tokens_per_epoch == (2**33 + 99) // length * length
    for begin in (0, batches.batches_per_epoch, 10**9):  # the whole stream is reached
        firsts = np.concatenate([batches[step]["tokens"][:, 0] for step in range(begin, begin + 25)])
        assert 0.4 < firsts.mean() / 2**28 < 0.6 and firsts.min() < 0.1 * 2**28 and firsts.max() > 0.9 * 2**28


def test_attributes(dataset):
    batches = TrainBatches(dataset, batch_size=4, sequence_length=L, seed=0)
    assert (batches.vocab_size, batches.document_token) == (257, 256)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"sequence_length": 24},
            "24 neither divides the block length 32 nor .*; the nearest that work are 16 and 32$",
        ),
        ({"sequence_length": 33}, "33 neither divides .*; the nearest that work are 32 and 64$"),
        ({"sequence_length": 3}, "3 neither divides .*; the nearest that work are 2 and 4$"),
        ({"sequence_length": (1 << 20) + 1}, r"1048577 neither divides .*; the nearest that works is \d{1,6}$"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, not 0"),
        (
            {"sequence_length": 1 << 20},
            r"too few for one sequence of 1048576; choose a sequence_length of at most \d+$",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": 10_000}, r"fewer than the batch size 10000; the largest batch size is \d+$"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"rows": range(2, 2)}, "the list of rows of a batch of 4 is empty"),
        ({"rows": range(5)}, "row 4 is not part of a batch of 4; rows are numbered from 0"),
        ({"rows": [2, 1]}, "the rows of a batch must be ascending, without repetitions"),
        ({"rows": [1, 1]}, "the rows of a batch must be ascending, without repetitions"),
        ({"split": "test"}, "has no split 'test'; the splits are train, heldout"),
        ({"paths": {}}, "the datasets of a mixture need finite weights above 0"),
        ({"paths": "nowhere"}, "no dataset at nowhere: the directory does not exist"),
    ],
)
def test_bad_requests_are_refused(dataset, changes, message):
    options = {"paths": dataset, "batch_size": 4, "sequence_length": L, "seed": 0, **changes}
    with pytest.raises(UserError, match=message):
        TrainBatches(options.pop("paths"), **options)


def test_the_proposed_sequence_length_works(dataset):
    with pytest.raises(UserError, match="too few") as raised:
        TrainBatches(dataset, batch_size=1, sequence_length=1 << 20, seed=0)
    proposed = int(str(raised.value).split()[-1])
    assert TrainBatches(dataset, batch_size=1, sequence_length=proposed, seed=0).examples_per_epoch == 1


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf])
def test_weights_have_to_be_positive_and_finite(dataset, other, weight):
    with pytest.raises(UserError, match="the datasets of a mixture need finite weights above 0"):
        TrainBatches({str(dataset): 1.0, str(other): weight}, batch_size=1, sequence_length=L, seed=0)


def test_datasets_of_a_mixture_share_their_tokenizer(dataset, tmp_path):
    different = make_dataset(tmp_path / "data", 0, "abcdefgh", tokenizer="bpe", vocab_size=300)
    paths = [str(dataset), str(different)]
    # The message names the document token too, since a file may offer several.
    of_file = f"{different}/tokenizer.json --document_token='<|endoftext|>'"
    for (first, second), proposed in ((paths, "bytes"), (paths[::-1], of_file)):
        message = f"prepared with different tokenizers; .* with {re.escape(f'--tokenizer={proposed}')}$"
        with pytest.raises(UserError, match=message):
            TrainBatches({first: 1, second: 1}, batch_size=1, sequence_length=L, seed=0)


def test_a_mixture_of_other_splits_is_warned_of(dataset, other, tmp_path, caplog):
    TrainBatches({dataset: 1, other: 1}, batch_size=1, sequence_length=L, seed=0)
    assert not caplog.records
    apart = make_dataset(tmp_path / "data", 2, "abcdefgh", heldout_fraction=0.2)
    TrainBatches({dataset: 1, apart: 1}, batch_size=1, sequence_length=L, seed=0)
    (record,) = caplog.records
    said = (
        f"{dataset} was split with seed 0 and heldout_fraction 0.3, and {apart} with 0 and 0.2: a document in "
        f"both may be trained on"
    )
    assert record.getMessage().startswith(said)


def test_heldout_refuses_before_the_first_batch(dataset):
    with pytest.raises(UserError, match="neither divides"):
        heldout_batches(dataset, batch_size=2, sequence_length=24)
    with pytest.raises(UserError, match="limit must be at least 1, not 0"):
        heldout_batches(dataset, batch_size=2, sequence_length=L, limit=0)


def test_import_is_light():
    """Worker processes import the package; importing JAX in each of them would cost seconds and memory."""
    program = "import sys, jaxlinear.data; print(sorted({'jax', 'grain', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "[]\n"
