"""Arrays that need not fit in memory: what they hold is read a few rows at a time, and written so into checkpoints."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

ROW_BYTES = 1 << 24  # of the rows that are read at once, where an array may be cut anywhere


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array by a function that reads it.

    Attributes:
      shape: with at least one axis.
      dtype: of what is read.
      rows: how much of the first axis is read at once.
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
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """The array, ``rows`` at a time, each part with where it begins."""
        for begin in range(0, self.shape[0], self.rows):
            yield begin, self.read(begin, min(begin + self.rows, self.shape[0]))


def rows_at_once(shape: Sequence[int], itemsize: int) -> int:
    """As many rows as have about ``ROW_BYTES``."""
    row = math.prod(shape[1:]) * itemsize
    return min(max(ROW_BYTES // max(row, 1), 1), max(shape[0], 1))


def save(directory: Path, tree: Any) -> None:
    """Writes a tree of ``StreamedArray`` leaves into ``directory``, which appears when it is whole. It is read like any
    other that Orbax wrote."""
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, _Handler()))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree))


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes one part after another, each a chunk of its own on the disk."""

    async def serialize(self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Any = None) -> list:
        for value, info in sorted(zip(values, infos, strict=True), key=lambda pair: pair[0].order):
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=(value.rows, *value.shape[1:]),
                dtype=value.dtype,
                process_index=0,
            )
            dtype = ts.dtype(value.dtype)
            store = await ts.open(ts.Spec(spec), dtype=dtype, create=True, open=True, context=info.ts_context)
            for begin, part in value.parts():
                await store[begin : begin + len(part)].write(part)
        return []


def open_array(directory: str | os.PathLike, name: str) -> StreamedArray:
    """An array of a tree that Orbax wrote into ``directory``, by the path of its keys with dots between them.

    ``ValueError`` if it is not there, and of ``read`` if it is damaged.
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
