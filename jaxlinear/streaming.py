"""Arrays that need not fit in memory: they are read, and written into checkpoints, a few rows at a time."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

PIECE_BYTES = 1 << 24  # passed on at a time, and read at a time where an array may be cut anywhere


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array defined by a function that reads it.

    Attributes:
      shape: with at least one axis.
      dtype: of what is read.
      rows: how many entries of the first axis are read at a time.
      read: ``(begin, end)`` -> the array's ``[begin:end]``.
      order: arrays that are written together are read in this order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    read: Callable[[int, int], np.ndarray]
    order: int = 0

    @property
    def size(self) -> int:
        """Entries of the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.size * self.dtype.itemsize

    @property
    def piece(self) -> tuple[int, ...]:
        """The shape that is passed on at a time: about ``PIECE_BYTES`` of what is read at a time."""
        shape = (self.rows, *self.shape[1:])
        axis = _split_axis(shape)
        return (*shape[:axis], rows_at_once(shape[axis:], self.dtype.itemsize), *shape[axis + 1 :])

    def pieces(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The array in consecutive pieces, each with its position."""
        axis = _split_axis((self.rows, *self.shape[1:]))
        length = self.piece[axis]
        for begin in range(0, self.shape[0], self.rows):
            part = self.read(begin, min(begin + self.rows, self.shape[0]))
            for first in range(0, part.shape[axis], length):
                place = [slice(begin, begin + len(part)), *map(slice, part.shape[1:])]
                start = first + (begin if axis == 0 else 0)
                # A copy, so that the whole part is not kept in memory while the next one is read.
                x = part[(slice(None),) * axis + (slice(first, first + length),)].copy()
                place[axis] = slice(start, start + x.shape[axis])
                yield tuple(place), x
            del part


def rows_at_once(shape: Sequence[int], itemsize: int) -> int:
    """The number of rows that have about ``PIECE_BYTES``."""
    row = math.prod(shape[1:]) * itemsize
    return min(max(PIECE_BYTES // max(row, 1), 1), max(shape[0], 1))


def _split_axis(shape: Sequence[int]) -> int:
    """The axis along which an array is cut into consecutive pieces: the first one longer than 1."""
    return next((axis for axis, length in enumerate(shape) if length > 1), 0)


def save(directory: Path, tree: Any) -> None:
    """Writes a tree of ``StreamedArray`` leaves into ``directory``, which appears only when it is complete. It can be read
    like any other directory that Orbax wrote."""
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, _Handler()))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree))


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes one piece after another, each as a chunk of its own on the disk."""

    async def serialize(self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Any = None) -> list:
        for value, info in sorted(zip(values, infos, strict=True), key=lambda pair: pair[0].order):
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=value.piece,
                dtype=value.dtype,
                process_index=0,
            )
            dtype = ts.dtype(value.dtype)
            store = await ts.open(ts.Spec(spec), dtype=dtype, create=True, open=True, context=info.ts_context)
            for place, piece in value.pieces():
                await store[place].write(piece)
        return []


def open_array(directory: str | os.PathLike, name: str) -> StreamedArray:
    """An array in a tree that Orbax wrote into ``directory``, named by its keys joined with dots.

    Raises ``ValueError`` if it is not there; ``read`` raises it if the array is damaged.
    """
    directory = Path(directory).absolute()
    if (directory / "manifest.ocdbt").exists():
        base = {"driver": "file", "path": f"{directory}/"}
        kvstore: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        kvstore = {"driver": "file", "path": f"{directory / name}/"}
    store: Any = ts.open({"driver": "zarr", "kvstore": kvstore}).result()
    return StreamedArray(
        shape=tuple(store.shape),
        dtype=store.dtype.numpy_dtype,
        rows=store.chunk_layout.read_chunk.shape[0],
        read=lambda begin, end: store[begin:end].read().result(),
    )
