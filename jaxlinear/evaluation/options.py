"""The options of an evaluation besides the names of its tasks."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Options:
    """The tasks that use an option are in brackets.

    Args:
      data: a prepared dataset (perplexity, passkey); by default the one that the run was evaluated on during training.
      lengths: multiples of the training length (perplexity). One that the dataset does not have is refused; by default 1,
        2, 4 and 8 as far as it has them.
      batches: how many batches to take of the longest rows, and as much text in shorter ones (perplexity); 0 takes the
        whole split.
      batch_tokens: tokens of a batch, or one row if it is longer (all); by default those of a microbatch in training.
      examples: examples of each difficulty (synthetic tasks).
    """

    data: str | None = None
    lengths: Sequence[int] | None = None
    batches: int = 0
    batch_tokens: int = 0
    examples: int = 256
