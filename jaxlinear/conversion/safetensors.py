"""Files in safetensors format: eight bytes with the length of the header, the header in JSON, the tensors' bytes.

The header gives, by name, each tensor's dtype, shape and position among the bytes. Tensors are read and written in parts.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxlinear.errors import UserError
from jaxlinear.streaming import StreamedArray, rows_at_once

# Dtypes of weights by their names in the format; float32 holds all of them exactly.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_LARGEST_HEADER = 100_000_000


def read(path: Path) -> dict[str, StreamedArray]:
    """The tensors of a file by name. Only the header is read at this point."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise UserError(f"{path} is not a safetensors file, or is truncated")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StreamedArray:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the entry of {name} is damaged") from error
    if not isinstance(kind, str) or any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise UserError(f"{path}: the entry of {name} is damaged")
    if kind not in DTYPES:
        raise UserError(f"{path}: {name} has the dtype {kind}; weights are imported from {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize or not begin <= end <= size - start:
        raise UserError(f"{path}: {name} is not where the header says; the file is truncated or damaged")
    row = math.prod(shape[1:])

    def read_rows(first: int, last: int) -> np.ndarray:
        offset = start + begin + first * row * dtype.itemsize
        return np.fromfile(path, dtype, (last - first) * row, offset=offset).reshape(-1, *shape[1:])

    # A scalar has no rows. No model here has one, and its shape is refused by name like any other.
    rows = rows_at_once(shape, dtype.itemsize) if shape else 1
    return StreamedArray(shape, dtype, rows, read_rows)


def header(tensors: Mapping[str, StreamedArray]) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file of these float32 tensors, and the position in the file where each of them begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.nbytes
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    places = {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in entries.items() if name in tensors}
    return len(text).to_bytes(8, "little") + text, places
