"""Encoding in several processes, in the order of the source; or decoding, if the source has tokens."""

import collections
import concurrent.futures.process
import itertools
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from jaxlinear.data.tokenizer import Tokenizer, load_tokenizer
from jaxlinear.errors import RunError

Document = str | np.ndarray  # its text, or its tokens [T]

# A worker is given this much at a time: enough to make the transfer cheap, little enough to keep all workers busy.
_BATCH_LENGTH = 1 << 19  # characters, or tokens
_BATCH_DOCUMENTS = 1024

_tokenizer: Tokenizer  # in a worker process


def encode_in_order(
    documents: Iterable[Document], tokenizer: Tokenizer, directory: pathlib.Path, workers: int
) -> Generator[tuple[str, np.ndarray], None, None]:
    """(text, tokens [T]) of every document, in order. The source has either texts or tokens.

    ``directory`` is where ``tokenizer`` is saved; ``workers`` processes load it from there. At most a few batches per
    worker are in memory at a time. A source of a single batch is encoded here, since starting a process takes longer.
    """
    batches = _batches(documents)
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if workers == 1 or len(first) < 2:
        for batch in batches:
            yield from _joined(batch, _other_half(tokenizer, batch))
        return
    # Spawned, because forking a process that has threads (JAX, tokenizers) can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (str(directory),))
    waiting: collections.deque[tuple[list[Document], concurrent.futures.Future]] = collections.deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch)))
            if len(waiting) > 3 * workers:
                done, future = waiting.popleft()
                yield from _joined(done, future.result())
        while waiting:
            done, future = waiting.popleft()
            yield from _joined(done, future.result())
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RunError(
            "an encoding process was killed, probably for lack of memory; fewer --workers need less"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _joined(batch: list[Any], others: list[Any]) -> Iterator[tuple[str, np.ndarray]]:
    return zip(batch, others, strict=True) if isinstance(batch[0], str) else zip(others, batch, strict=True)


def _other_half(tokenizer: Tokenizer, batch: list[Any]) -> list[Any]:
    """The tokens of texts, or the texts of tokens."""
    return tokenizer.encode_batch(batch) if isinstance(batch[0], str) else list(map(tokenizer.decode, batch))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_LENGTH or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start_worker(directory: str) -> None:
    global _tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already run in parallel
    _tokenizer = load_tokenizer(directory)


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed, which a worker waiting for work would not notice."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(batch: list[Document]) -> list[Document]:
    return _other_half(_tokenizer, batch)
