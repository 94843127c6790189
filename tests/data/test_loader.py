"""The loader: a pure function of (seed, step), the same on any number of hosts, faithful to the stream."""

import dataclasses
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxlinear.data import TrainBatches, heldout_batches, loader, prepare, read_manifest
from jaxlinear.data.blocks import SplitReader, encode_block
from jaxlinear.data.manifest import Shard
from jaxlinear.errors import UserError
from tests.data.sources_of_text import stream_and_segments, write_jsonl

REPOSITORY = pathlib.Path(__file__).parents[2]
L = 32


def make_dataset(directory, seed, characters, **options):
    """Bytes as tokens, in documents of 1 to 99 letters; ``characters`` tell the datasets apart."""
    random = np.random.default_rng(seed)
    texts = ["".join(random.choice(list(characters), random.integers(1, 100))) + str(i) for i in range(200)]
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "block_length": L, "workers": 1, **options}
    prepare(write_jsonl(directory.with_suffix(".jsonl"), texts), directory, **options)
    return directory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("a") / "data", 0, "abcdefgh")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("b") / "data", 1, "ABCDEFGH")


def examples(path, split, length=L, count=None) -> np.ndarray:
    """Tokens, targets and segments [count, 3 T] of the examples in order, by default all complete ones; 0 after the end."""
    stream, documents = stream_and_segments(path, split)
    last = len(stream) - 1
    count = count or last // length
    places = np.arange(count)[:, None] * length + np.arange(length)
    stream, documents = (np.pad(values, (0, max(count * length - last, 0))) for values in (stream, documents))
    found = stream[places], stream[places + 1], documents[places] - documents[places[:, :1]] + 1
    return np.concatenate([np.where(places < last, values, 0) for values in found], axis=1).astype(np.int32)


def rows_of(batches) -> np.ndarray:
    """Tokens, targets and segments of every row: [rows, 3 T]."""
    names = ("tokens", "targets", "segment_ids")
    assert all(batch[name].dtype == np.int32 for batch in batches for name in names)
    return np.concatenate([np.concatenate([batch[name] for name in names], axis=1) for batch in batches])


def sorted_rows(rows) -> list[bytes]:
    return sorted(map(bytes, rows))


def assert_same(a, b):
    assert a.keys() == b.keys() == {"tokens", "targets", "segment_ids"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


@pytest.mark.parametrize("length", [4, 8, L, 3 * L])
def test_an_epoch_is_a_permutation_of_the_stream(dataset, length):
    """And the next is another one."""
    in_order = examples(dataset, "train", length)
    batches, by_four = (TrainBatches(dataset, batch_size=n, sequence_length=length, seed=0) for n in (1, 4))
    count = len(in_order)
    assert batches.examples_per_epoch == by_four.examples_per_epoch == count
    assert by_four.batches_per_epoch == count // 4 > 10
    assert batches.tokens_per_epoch == count * length
    first, second = (rows_of([batches[e * count + i] for i in range(count)]) for e in (0, 1))
    assert sorted_rows(first) == sorted_rows(second) == sorted_rows(in_order)
    for one, another in ((first, second), (first, in_order)):
        assert np.mean(np.all(one == another, axis=1)) < 0.1


def test_the_order_is_of_the_examples_and_not_of_steps(dataset):
    """Nor does it depend on what was read before, or on the batch size."""
    small, large = (TrainBatches(dataset, batch_size=size, sequence_length=L, seed=3) for size in (2, 10))
    steps = np.random.default_rng(0).permutation(50)
    rows = rows_of([small[step] for step in steps.tolist()]).reshape(50, 2, -1)
    np.testing.assert_array_equal(rows[np.argsort(steps)].reshape(100, -1), rows_of([large[i] for i in range(10)]))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rows", [range(3), range(3, 6), range(1), range(1, 2), range(2, 6), [0, 2, 3, 5]])
def test_each_host_has_its_rows_of_the_batch(dataset, other, mixed, rows):
    paths = {str(dataset): 0.5, str(other): 0.5} if mixed else dataset
    options = {"batch_size": 6, "sequence_length": 2 * L}
    whole, host = (TrainBatches(paths, seed=0, rows=some, **options) for some in (None, rows))
    steps = [(host[step], whole[step]) for step in (0, 7, 1000)]
    heldout, of_host = (list(heldout_batches(dataset, rows=some, **options)) for some in (None, rows))
    assert len(heldout) > 3
    for got, batch in (*steps, *zip(of_host, heldout, strict=True)):
        assert_same(got, {name: values[list(rows)] for name, values in batch.items()})


def test_seeds_give_other_orders(dataset):
    """Nor is the second epoch of one seed the first epoch of the next."""
    batches = [TrainBatches(dataset, batch_size=1, sequence_length=L, seed=s) for s in (0, 1)]
    count = batches[0].examples_per_epoch
    other_seed = rows_of([batches[1][i] for i in range(40)])
    for begin in (0, count):
        assert np.mean(np.all(rows_of([batches[0][begin + i] for i in range(40)]) == other_seed, axis=1)) < 0.1


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


SHARES = [
    ((0.75, 0.25), (3, 1)),
    ((3, 1), (3, 1)),
    ((0.7, 0.3), (7, 3)),
    ((0.5, 0.497), (500, 497)),
    ((0.29, 0.29, 0.42), (29, 29, 42)),
    ((np.float64(0.1), 1, 1e-3, 0.2), (100, 1000, 1, 200)),
]


@pytest.mark.parametrize("weights, shares", SHARES)
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
    np.testing.assert_array_equal([order[i] // size for i in range(far, far + period)], which[:period])


@pytest.mark.parametrize("weight", [1, 3])
def test_mixture_shows_each_dataset_in_whole_epochs(dataset, other, weight):
    """An epoch of the mixture ends with the dataset that is exhausted first."""
    paths = {str(dataset): weight, str(other): 1}
    batches = TrainBatches(paths, batch_size=1 + weight, sequence_length=L, seed=0)
    of_each = [examples(path, "train") for path in paths]
    assert batches.examples_per_epoch == min(
        len(of_each[k]) * (1 + weight) // share for k, share in enumerate((weight, 1))
    )
    rows = rows_of([batches[i] for i in range(len(of_each[1]))])
    # Capitals belong to the second dataset. A row can be all digits and document tokens, but not one of 32 tokens.
    first, second = (np.any((rows >= ord(a)) & (rows <= ord(h)), axis=1) for a, h in ("ah", "AH"))
    assert np.all(first != second) and np.all(second.reshape(-1, 1 + weight).sum(axis=1) == 1)
    assert sorted_rows(rows[second]) == sorted_rows(of_each[1])


def test_epochs_end(dataset):
    batches = TrainBatches(dataset, batch_size=7, sequence_length=L, seed=0, epochs=2)
    assert batches.num_batches == 2 * batches.examples_per_epoch // 7
    assert (batches.vocab_size, batches.document_token) == (257, 256)
    assert len(list(batches)) == batches.num_batches
    for step in (batches.num_batches, -1):
        with pytest.raises(IndexError, match=f"no batch {step} among {batches.num_batches}"):
            batches[step]
    assert TrainBatches(dataset, batch_size=7, sequence_length=L, seed=0).num_batches is None


@pytest.mark.parametrize("split", ["heldout", "train"])
@pytest.mark.parametrize("length", [1, 4, L, 2 * L, 64 * L])
def test_heldout_has_every_target_once(dataset, split, length):
    """In order. Padding is only at the end, and shorter than a batch."""
    batches = list(heldout_batches(dataset, batch_size=5, sequence_length=length, split=split))
    assert all(batch["tokens"].shape == (5, length) for batch in batches)
    rows, targets = rows_of(batches), read_manifest(dataset).splits[split].tokens - 1
    np.testing.assert_array_equal(rows, examples(dataset, split, length, len(rows)))
    assert 0 <= len(rows) * length - targets < 5 * length
    assert np.sum(rows[:, 2 * length :] > 0) == targets


@pytest.fixture
def vast(dataset, tmp_path, monkeypatch):
    """2 ** 33 + 100 tokens in shards without content. Records are made as they are read: token j of block k is k + j."""
    manifest = read_manifest(dataset)
    tokens, per_shard, size = 2**33 + 100, 1 << 16, 5
    blocks = -(-(tokens - 1) // L)
    (tmp_path / "train").mkdir()
    sizes = [min(per_shard, blocks - first) for first in range(0, blocks, per_shard)]
    shards = tuple(Shard(f"train/{k:05d}.array_record", n, size) for k, n in enumerate(sizes))
    for shard in shards:
        (tmp_path / shard.file).write_bytes(bytes(size))

    def read_shard(self, shard, positions):
        firsts = [shard * per_shard + position for position in positions]
        assert all(0 <= position < shards[shard].records for position in positions)
        starts = np.array([3, 20])
        return [encode_block(first + np.arange(L + 1), starts, L, "uint32") for first in firsts]

    monkeypatch.setattr(SplitReader, "_read_shard", read_shard)
    changes = {"tokens": tokens, "documents": 2 * blocks, "blocks": blocks, "shards": shards}
    train = dataclasses.replace(manifest.splits["train"], **changes)
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


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"sequence_length": 24}, "24 neither divides the block length 32 .* work are 16 and 32$"),
        ({"sequence_length": 33}, "33 neither divides .* work are 32 and 64$"),
        ({"sequence_length": 3}, "3 neither divides .* work are 2 and 4$"),
        ({"sequence_length": (1 << 20) + 1}, r"neither divides .* nearest that works is \d{1,6}$"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 10_000}, r"the largest batch size is \d+$"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"rows": range(2, 2)}, "empty"),
        ({"rows": range(5)}, "row 4"),
        ({"rows": [2, 1]}, "ascending"),
        ({"rows": [1, 1]}, "ascending"),
        ({"split": "test"}, "no split 'test'"),
        ({"paths": {}}, "finite weights above 0"),
        ({"paths": "nowhere"}, "no dataset at nowhere"),
        *(({"weight": weight}, "finite weights above 0") for weight in (0.0, math.nan, math.inf)),
    ],
)
def test_bad_requests_are_refused(dataset, other, changes, key):
    options = {"paths": dataset, "batch_size": 4, "sequence_length": L, "seed": 0, **changes}
    if "weight" in options:
        options["paths"] = {str(dataset): 1.0, str(other): options.pop("weight")}
    with pytest.raises(UserError, match=key):
        TrainBatches(options.pop("paths"), **options)


def test_the_proposed_sequence_length_works(dataset):
    with pytest.raises(UserError, match="too few") as raised:
        TrainBatches(dataset, batch_size=1, sequence_length=1 << 20, seed=0)
    proposed = int(str(raised.value).split()[-1])
    assert TrainBatches(dataset, batch_size=1, sequence_length=proposed, seed=0).examples_per_epoch == 1


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
    (message,) = caplog.messages
    assert message.startswith(f"{dataset} was split with seed 0 and heldout_fraction 0.3, and {apart} with 0 and 0.2: ")


def test_heldout_has_a_limit_and_refuses_before_the_first_batch(dataset):
    whole, limited = (list(heldout_batches(dataset, batch_size=6, sequence_length=L, limit=n)) for n in (None, 2))
    assert len(whole) > 3 and len(limited) == 2
    assert_same(limited[1], whole[1])
    for changes, key in (({"sequence_length": 24}, "neither divides"), ({"limit": 0}, "limit must be at least 1")):
        with pytest.raises(UserError, match=key):
            heldout_batches(dataset, **{"batch_size": 2, "sequence_length": L, **changes})


def test_import_is_light():
    """Worker processes import the package; importing JAX in each of them would cost seconds and memory."""
    program = "import sys, jaxlinear.data; print(sorted({'jax', 'grain', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "[]\n"
