"""Batches of a prepared dataset, addressed by index.

Example i of epoch e is a pure function of (seed, e, i): an example's global index is mapped to its position in the datasets
(a mixture of shuffles, each reseeded every epoch), and the rows of a batch are read together. So a loader's state is the
step, and the hosts of a run agree without communicating.
"""

import fractions
import itertools
import logging
import math
import os
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxlinear.data.blocks import SplitReader, decode_block
from jaxlinear.data.manifest import Manifest, read_manifest
from jaxlinear.data.tokenizer import load_tokenizer
from jaxlinear.errors import UserError

_LOG = logging.getLogger(__name__)

# Rounds of the shuffling cipher. grain's ``MapDataset.shuffle`` has 4, after which the positions of neighbours still
# correlate (tests/data/test_loader.py); after 8 they do not. More cost time where examples are few: the cipher has 16 bits
# and is applied until a number is below their count.
_ROUNDS = 8
# The name of this order of examples, which a run records in its directory; with another recorded there it is refused.
SHUFFLE = f"index_shuffle, {_ROUNDS} rounds"

Path = str | os.PathLike[str]
Batch = dict[str, np.ndarray]


class TrainBatches:
    """``batches[step]`` is this host's rows of global batch ``step``.

    A batch is a dict of int32 arrays [b, T], with a row for each of ``rows`` (by default all): ``tokens``; ``targets``, the
    token after each; and ``segment_ids``, 1, 2, 3 ... by document within a row. Batch ``step`` holds the examples step B
    ... step B + B - 1, however many hosts there are.

    ``paths`` is a dataset, or several with their weights: the share of the examples that comes from each. An epoch of
    a mixture ends when the first of its datasets has been seen once; then all continue, each reshuffled when it has been
    read through. ``epochs`` ends the sequence (IndexError after it, so that ``for batch in batches`` works).
    """

    def __init__(
        self,
        paths: Mapping[str, float] | Path,
        *,
        split: str = "train",
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: Sequence[int] | None = None,
        epochs: int | None = None,
    ):
        weights = {paths: 1.0} if isinstance(paths, str | os.PathLike) else dict(paths)
        _check_positive(batch_size=batch_size, sequence_length=sequence_length, epochs=epochs)
        if seed < 0:
            raise UserError(f"seed must be at least 0, not {seed}")
        if not weights or not all(0 < weight < math.inf for weight in weights.values()):  # NaN is not
            raise UserError(f"the datasets of a mixture need finite weights above 0, not {weights}")
        self._tables = [ExampleTable(path, split, sequence_length) for path in weights]
        manifests = [table.manifest for table in self._tables]
        check_same_tokenizer(list(weights), manifests)
        warn_of_splits(list(weights), manifests)
        # Examples after the last complete one are left out.
        lengths = [table.whole_examples for table in self._tables]
        for path, table, length in zip(weights, self._tables, lengths, strict=True):
            if length == 0:
                raise UserError(
                    f"the {split} split of {path} has {table.targets} targets, too few for one sequence of "
                    f"{sequence_length}; choose a sequence_length of at most {table.largest_sequence_length()}"
                )
        self._ends = np.cumsum(lengths)
        self._order, self.examples_per_epoch = _order(lengths, list(weights.values()), seed)
        if self.examples_per_epoch < batch_size:
            raise UserError(
                f"an epoch has {self.examples_per_epoch} examples of length {sequence_length}, fewer than the batch "
                f"size {batch_size}; the largest batch size is {self.examples_per_epoch}"
            )
        self._rows = check_rows(rows, batch_size)
        self._batch_size = batch_size
        self.vocab_size = manifests[0].vocab_size
        self.document_token = manifests[0].document_token
        self.batches_per_epoch = self.examples_per_epoch // batch_size
        self.tokens_per_epoch = self.examples_per_epoch * sequence_length
        self.num_batches = None if epochs is None else epochs * self.examples_per_epoch // batch_size

    def __getitem__(self, step: int) -> Batch:
        if step < 0 or (self.num_batches is not None and step >= self.num_batches):
            raise IndexError(f"no batch {step} among {self.num_batches or 'all'}")
        first = step * self._batch_size
        places = np.array([self._order[first + row] for row in self._rows], np.int64)
        if len(self._tables) == 1:
            return self._tables[0].read(places)
        which = np.searchsorted(self._ends, places, side="right")
        batch: Batch = {}
        for k in np.unique(which):
            (where,) = np.nonzero(which == k)
            part = self._tables[k].read(places[where] - (self._ends[k - 1] if k else 0))
            for name, values in part.items():
                batch.setdefault(name, np.empty((len(places), values.shape[1]), np.int32))[where] = values
        return batch


def heldout_batches(
    path: Path,
    *,
    batch_size: int,
    sequence_length: int,
    split: str = "heldout",
    rows: Sequence[int] | None = None,
    limit: int | None = None,
) -> Iterator[Batch]:
    """The whole split in order, or its first ``limit`` batches: dicts like those of ``TrainBatches``.

    Every token of the stream but the first is a target exactly once. The end is padded to whole batches with segment 0
    (token and target 0 there), so every host gets the same number of batches.
    """
    _check_positive(batch_size=batch_size, sequence_length=sequence_length, limit=limit)
    table = ExampleTable(path, split, sequence_length)
    own = np.array(check_rows(rows, batch_size))
    num_batches = -(-table.examples // batch_size)

    def batches() -> Iterator[Batch]:
        for step in range(num_batches if limit is None else min(limit, num_batches)):
            yield table.read(step * batch_size + own)

    return batches()


class ExampleTable:
    """The examples of one split at sequence length T: example j has the targets j T + 1 ... j T + T of the stream."""

    def __init__(self, path: Path, split: str, sequence_length: int):
        self.manifest = read_manifest(path)
        if split not in self.manifest.splits:
            raise UserError(f"{path} has no split {split!r}; the splits are {', '.join(self.manifest.splits)}")
        info = self.manifest.splits[split]
        self.targets = max(info.tokens - 1, 0)
        self._check_sequence_length(sequence_length)
        self._reader = SplitReader(pathlib.Path(path), info)
        self._path, self._sequence_length = path, sequence_length
        self.whole_examples = self.targets // sequence_length
        self.examples = -(-self.targets // sequence_length)

    def _check_sequence_length(self, sequence_length: int) -> None:
        block_length = self.manifest.block_length
        if sequence_length % block_length == 0 or block_length % sequence_length == 0:
            return
        lengths = _lengths_that_work(block_length, min(sequence_length + block_length, max(self.targets, 1)))
        below = max(n for n in lengths if n < sequence_length)
        above = [n for n in lengths if n > sequence_length][:1]  # none if the split has too few tokens
        nearest = f"nearest that work are {below} and {above[0]}" if above else f"nearest that works is {below}"
        raise UserError(
            f"sequence_length {sequence_length} neither divides the block length {block_length} nor is a multiple of "
            f"it; the {nearest}"
        )

    def largest_sequence_length(self) -> int:
        """The longest sequence length that the split's tokens and block length allow; 0 if there is none."""
        return max(_lengths_that_work(self.manifest.block_length, self.targets), default=0)

    def read(self, examples: np.ndarray) -> Batch:
        """examples: [b] -> arrays [b, T]; an index after the last example gives a row of padding."""
        length, block_length = self._sequence_length, self.manifest.block_length
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        starts_at = examples * length
        present = np.flatnonzero(starts_at < self.targets)
        blocks_each = max(length // block_length, 1)
        first_block = starts_at[present] // block_length
        blocks = (first_block[:, None] + np.arange(blocks_each)).ravel()
        rows = np.repeat(present, blocks_each)
        exists = blocks < self._reader.blocks
        blocks, rows = blocks[exists], rows[exists]
        stream = np.zeros((len(examples), length + 1), np.int32)
        starts = np.zeros((len(examples), length), np.int32)
        taken = min(length, block_length)
        # Where the block starts within the row (0 or more) or, if below 0, where the row starts within the block.
        offsets = (blocks * block_length - starts_at[rows]).tolist()
        for record, block, row, offset in zip(
            self._reader.read(blocks), blocks.tolist(), rows.tolist(), offsets, strict=True
        ):
            try:
                _, tokens, documents = decode_block(record, block_length, dtype)
            except ValueError as error:
                raise UserError(
                    f"block {block} of {self._path} is damaged: {error}; prepare the dataset again"
                ) from error
            if offset >= 0:
                stream[row, offset : offset + taken + 1] = tokens[: taken + 1]
                starts[row, offset + documents[documents < taken]] = 1
            else:
                stream[row] = tokens[-offset : -offset + length + 1]
                inside = documents[(documents >= -offset) & (documents < -offset + length)]
                starts[row, inside + offset] = 1
        starts[:, 0] = 1
        segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
        tokens, targets = stream[:, :-1], stream[:, 1:]
        if (ends := starts_at + length - self.targets).max(initial=0) > 0:
            padding = np.arange(length) >= (length - ends)[:, None]
            tokens, targets = np.where(padding, 0, tokens), np.where(padding, 0, targets)
            segment_ids = np.where(padding, 0, segment_ids)
        tokens, targets = map(np.ascontiguousarray, (tokens, targets))
        return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}


def _order(lengths: Sequence[int], weights: Sequence[float], seed: int) -> tuple["_Shuffled | _Mixture", int]:
    """(example index in the run -> position in the concatenated datasets, examples per epoch)."""
    offsets = np.cumsum([0, *lengths]).tolist()
    seeds = np.random.SeedSequence(seed).generate_state(len(lengths)).tolist()
    shuffled = [_Shuffled(*ends, s) for ends, s in zip(itertools.pairwise(offsets), seeds, strict=True)]
    if len(shuffled) == 1:
        return shuffled[0], lengths[0]
    # The weights as whole numbers, in exactly the ratio of their decimal notations.
    exact = [fractions.Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    epoch = min(length * sum(shares) // share for length, share in zip(lengths, shares, strict=True))
    return _Mixture(shuffled, shares), epoch


class _Shuffled:
    """The numbers from ``start`` to ``stop`` in a random order, then all again in another order, without end."""

    def __init__(self, start: int, stop: int, seed: int):
        # Imported here: grain imports JAX, which neither worker processes nor the preparation need.
        from grain.experimental import index_shuffle

        self._shuffle, self._start, self._length, self._seed = index_shuffle, start, stop - start, seed

    def __getitem__(self, index: int) -> int:
        epoch, i = divmod(index, self._length)
        seed = (self._seed + epoch) % (1 << 32)
        return self._start + self._shuffle(i, max_index=self._length - 1, seed=seed, rounds=_ROUNDS)


class _Mixture:
    """Several endless orders as one: for every k, each dataset has its share of the first k examples, with an error below
    the number of datasets.

    grain's mixture does the same, but rounds weights down to hundredths of the smallest: it mixes 0.5 and 0.497 as 1 to 1.
    """

    def __init__(self, parts: Sequence[_Shuffled], shares: Sequence[int]):
        self._parts, self._shares = parts, shares

    def __getitem__(self, index: int) -> int:
        # The first dataset gets its share of all, rounded up; the next its share of the remainder; and so on.
        remaining = sum(self._shares)
        for part, share in zip(self._parts, self._shares, strict=True):
            left, left_after = (k * (remaining - share) // remaining for k in (index, index + 1))
            if left == left_after:
                return part[index - left]
            index, remaining = left, remaining - share
        raise AssertionError("the last dataset takes what the others left")


def _lengths_that_work(block_length: int, limit: int) -> list[int]:
    """The sequence lengths up to ``limit`` that divide the block length or are multiples of it."""
    divisors = [n for n in range(1, min(block_length, limit + 1)) if block_length % n == 0]
    return divisors + list(range(block_length, limit + 1, block_length))


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")


def check_rows(rows: Sequence[int] | None, batch_size: int) -> list[int]:
    """The rows of a batch that this host has, by default all. They ascend, but need not be contiguous."""
    found = list(range(batch_size) if rows is None else rows)
    if not found:
        raise UserError(f"the list of rows of a batch of {batch_size} is empty")
    if outside := [row for row in found if not 0 <= row < batch_size]:
        raise UserError(f"row {outside[0]} is not part of a batch of {batch_size}; rows are numbered from 0")
    if any(later <= row for row, later in itertools.pairwise(found)):
        raise UserError("the rows of a batch must be ascending, without repetitions")
    return found


def check_same_tokenizer(paths: Sequence[str | os.PathLike], manifests: Sequence[Manifest]) -> None:
    """Raises ``UserError`` for the first dataset whose tokenizer is not that of the first dataset."""
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise UserError(
                f"{paths[0]} and {path} were prepared with different tokenizers; prepare the second with "
                f"{_options_of_tokenizer(paths[0], manifests[0])}"
            )


def _options_of_tokenizer(path: Path, manifest: Manifest) -> str:
    """Options of prepare_data with which another dataset gets this one's tokenizer."""
    if manifest.tokenizer.file is None:
        return f"--tokenizer={manifest.tokenizer.kind}"
    # Two tokenizers that differ in their document tokens have the same file.
    name = shlex.quote(load_tokenizer(path).document_token_name)
    return f"--tokenizer={os.path.join(path, manifest.tokenizer.file)} --document_token={name}"


def warn_of_splits(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Warns unless all datasets have the same seed and held-out fraction: only then do two of them put a document, by its
    hash, in the same split."""
    first = manifests[0]
    for path, manifest in zip(paths, manifests, strict=True):
        if (manifest.seed, manifest.heldout_fraction) != (first.seed, first.heldout_fraction):
            _LOG.warning(
                "%s was split with seed %d and heldout_fraction %g, and %s with %d and %g: a document in both may be "
                "trained on in one and held out in the other; prepare both with the same values",
                *(paths[0], first.seed, first.heldout_fraction, path, manifest.seed, manifest.heldout_fraction),
            )
