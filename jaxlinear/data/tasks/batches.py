"""Batches of a synthetic task, addressed by index like those of a dataset."""

from collections.abc import Sequence

import numpy as np

from jaxlinear.data.loader import Batch, check_rows
from jaxlinear.data.tasks.task import Example, Task

SPLITS = {"train": 0, "heldout": 1}


class TaskBatches:
    """``batches[step]`` is this host's rows of global batch ``step``: int32 arrays ``[b, T]`` ``tokens``, ``segment_ids``
    (all 1), and ``targets``, which are below 0 where there is nothing to predict.

    Batch ``step`` holds the examples step B ... step B + B - 1, however many hosts there are. Example i of a split is a
    pure function of (seed, split, i), and no two splits share a generator. Several difficulties, which have the same
    length, get equally many examples: example i has difficulty number i modulo their count.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        batch_size: int,
        seed: int,
        split: str = "train",
        rows: Sequence[int] | None = None,
    ):
        self.tasks = tuple(tasks)
        self.vocab_size = max(task.vocabulary for task in tasks)
        self._rows = check_rows(rows, batch_size)
        self._batch_size, self._key = batch_size, (seed, SPLITS[split])

    def __getitem__(self, step: int) -> Batch:
        first = step * self._batch_size
        examples = [self._example(first + row) for row in self._rows]
        tokens, targets = (np.stack(arrays).astype(np.int32) for arrays in zip(*examples, strict=True))
        return {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens)}

    def _example(self, i: int) -> Example:
        return self.tasks[i % len(self.tasks)].example(np.random.default_rng((*self._key, i)))
