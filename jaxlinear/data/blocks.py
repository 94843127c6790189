"""Fixed-length blocks of a token stream on disk: packing documents into records, and reading records by index.

A split is one stream of N tokens: every document is written as [document token] + its tokens. Block k holds the
stream's tokens k L .. k L + L (L + 1 of them: one overlaps with the next block, so that every block has the targets for
all its L positions). A record is, in little-endian order,

    uint32 valid         how many of the L + 1 tokens are real; less than L + 1 only in the last block
    uint32 starts        how many documents start in the block
    dtype[L + 1] tokens  zero after the valid ones
    int32[starts]        positions in 0 .. L - 1 where a document starts
"""

import collections
import contextlib
import errno
import os
import pathlib
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from jaxlinear.data.manifest import MANIFEST, Shard, Split
from jaxlinear.errors import UserError

RECORDS_PER_SHARD = 1 << 16
_HEADER = struct.Struct("<II")
_OPEN_SHARDS = 128  # file handles kept open at a time; a process may be limited to 256
# Errors that the ArrayRecord library reports only in the text of a RuntimeError.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)


def token_dtype(vocab_size: int) -> str:
    """The smallest unsigned dtype that holds every token."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def encode_block(tokens: np.ndarray, starts: np.ndarray, block_length: int, dtype: str) -> bytes:
    """tokens: [valid], valid <= L + 1; starts: positions of documents in 0 .. L - 1 -> record."""
    padded = np.zeros(block_length + 1, np.dtype(dtype).newbyteorder("<"))
    padded[: len(tokens)] = tokens
    return _HEADER.pack(len(tokens), len(starts)) + padded.tobytes() + starts.astype("<i4").tobytes()


def decode_block(record: bytes, block_length: int, dtype: np.dtype) -> tuple[int, np.ndarray, np.ndarray]:
    """record -> (valid, tokens [L + 1], starts). Raises ValueError for a record of the wrong size."""
    valid, num_starts = _HEADER.unpack_from(record)
    offset = _HEADER.size + (block_length + 1) * dtype.itemsize
    if len(record) != offset + 4 * num_starts:
        raise ValueError(f"a record of {len(record)} bytes instead of {offset + 4 * num_starts}")
    tokens = np.frombuffer(record, dtype, block_length + 1, _HEADER.size)
    return valid, tokens, np.frombuffer(record, "<i4", num_starts, offset)


class SplitWriter:
    """Packs the documents of one split, in the order in which they arrive, into shards under ``directory/name``."""

    def __init__(self, directory: pathlib.Path, name: str, *, block_length: int, dtype: str, document_token: int):
        self._directory, self._name = directory, name
        self._block_length, self._dtype, self._document_token = block_length, dtype, document_token
        self._pending: list[np.ndarray] = []  # tokens that do not fill a block yet
        self._pending_tokens = 0
        self._pending_starts: list[int] = []  # positions of documents among the pending tokens
        self._writer: Any = None
        self._records_in_shard = 0
        self._shards: list[Shard] = []
        self.documents = self.tokens = self.bytes = self.blocks = 0
        (directory / name).mkdir()

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        """Appends one document; tokens: [T] without the document token."""
        self._pending_starts.append(self._pending_tokens)
        self._pending += [np.array([self._document_token], self._dtype), tokens.astype(self._dtype)]
        self._pending_tokens += 1 + len(tokens)
        self.documents += 1
        self.tokens += 1 + len(tokens)
        self.bytes += num_bytes
        if self._pending_tokens > self._block_length:
            self._write_blocks(last=False)

    def finish(self) -> Split:
        """Writes the last block and closes the last shard."""
        self._write_blocks(last=True)
        self._close_shard()
        return Split(self.documents, self.tokens, self.bytes, self.blocks, tuple(self._shards))

    def _write_blocks(self, *, last: bool) -> None:
        stream = np.concatenate(self._pending) if self._pending else np.zeros(0, self._dtype)
        starts = np.array(self._pending_starts, np.int64)
        length, position = self._block_length, 0
        # A remainder of one token makes no block: it is already the last target of the previous block.
        while len(stream) - position > (1 if last else length):
            first, end = np.searchsorted(starts, [position, position + length])
            block = stream[position : position + length + 1]
            self._write(encode_block(block, starts[first:end] - position, length, self._dtype))
            position += length
        self._pending = [stream[position:]]
        self._pending_tokens = len(stream) - position
        self._pending_starts = (starts[starts >= position] - position).tolist()

    def _write(self, record: bytes) -> None:
        if self._writer is None:
            self._writer = _call(self._shard_path(), array_record_module.ArrayRecordWriter, "group_size:1")
        self._writer.write(record)
        self.blocks += 1
        self._records_in_shard += 1
        if self._records_in_shard == RECORDS_PER_SHARD:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        path = self._shard_path()
        # The writer buffers, and reports every failure, even a full disk, when it is closed.
        _call(path, lambda _: self._writer.close())
        self._writer = None
        file = path.relative_to(self._directory).as_posix()
        self._shards.append(Shard(file, self._records_in_shard, path.stat().st_size))
        self._records_in_shard = 0

    def _shard_path(self) -> pathlib.Path:
        return self._directory / self._name / f"{len(self._shards):05d}.array_record"

    def abandon(self) -> None:
        """Closes the open shard after a failure elsewhere; its content is about to be deleted."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with contextlib.suppress(RuntimeError):  # the same failure again
                writer.close()


def _call(path: pathlib.Path, function: Any, *arguments: Any) -> Any:
    """Calls ``function(path, *arguments)`` of the ArrayRecord library and turns its disk errors into OSError."""
    try:
        return function(str(path), *arguments)
    except RuntimeError as error:
        for code in _DISK_ERRORS:
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code), str(path)) from error
        raise


def _mark(file: pathlib.Path) -> tuple[int, ...] | None:
    """A value that changes when a file is rewritten; None if there is no such file."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _content(file: pathlib.Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


class SplitReader:
    """Random access to the blocks of one split. Shards open on first read; the most recently used stay open."""

    def __init__(self, directory: str | os.PathLike[str], split: Split):
        self._directory, self._shards, self.blocks = pathlib.Path(directory), split.shards, split.blocks
        self._manifest = self._directory / MANIFEST
        self._looked_at, self._content = _mark(self._manifest), _content(self._manifest)
        self._ends = np.cumsum([shard.records for shard in split.shards])
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()  # prefetching and evaluation read in different threads

    def read(self, blocks: Sequence[int] | np.ndarray) -> list[bytes]:
        """The records of ``blocks``, in that order."""
        blocks = np.asarray(blocks)
        shards = np.searchsorted(self._ends, blocks, side="right")
        records: list[bytes] = [b""] * len(blocks)
        with self._lock:
            for shard in np.unique(shards):
                (where,) = np.nonzero(shards == shard)
                first = self._ends[shard] - self._shards[shard].records
                found = self._read_shard(int(shard), (blocks[where] - first).tolist())
                for i, record in zip(where.tolist(), found, strict=True):
                    records[i] = record
        return records

    def _read_shard(self, shard: int, positions: list[int]) -> list[bytes]:
        path = self._directory / self._shards[shard].file
        try:
            if shard not in self._open:
                self._open[shard] = self._open_shard(path, self._shards[shard].records)
            self._open.move_to_end(shard)
            return self._open[shard].read(positions)
        except (RuntimeError, IndexError) as error:  # how the ArrayRecord library reports damage
            raise UserError(f"shard {path} cannot be read: {error}; prepare the dataset again") from error

    def _open_shard(self, path: pathlib.Path, expected: int) -> Any:
        # No read-ahead: the records of a batch can be anywhere.
        options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 15}
        reader = array_record_module.ArrayRecordReader(str(path), **options)
        if not reader.ok() or reader.num_records() != expected:
            found = reader.num_records()
            raise UserError(f"shard {path} is damaged: it holds {found} blocks instead of {expected}")
        # Another dataset has shards of the same names and, except for the last, of as many blocks. Shards of a large
        # dataset are opened all the time, so the manifest is read again only if it was rewritten.
        if (mark := _mark(self._manifest)) != self._looked_at:
            if _content(self._manifest) != self._content:
                raise UserError(f"the dataset in {self._directory} was replaced by a new one while it was being read")
            self._looked_at = mark
        if len(self._open) >= _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return reader
