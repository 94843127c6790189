"""Files of token ids: flat ones, and those of NumPy, Megatron-LM and llm.c. Each is read in parts of bounded size.

The layouts are those of the programs that write them: Megatron-LM's `megatron/core/datasets/indexed_dataset.py` and
llm.c's `dev/data/data_common.py`; nanoGPT's `train.bin` is a flat file of uint16.
"""

import itertools
import pathlib
import struct
import zipfile
from collections.abc import Iterator

import numpy as np

from jaxlinear.data.compressed import DamagedFile, read_chunks, stripped_suffix
from jaxlinear.data.records import Record
from jaxlinear.data.token_ids import Ids
from jaxlinear.errors import UserError

FLAT = ("uint16", "uint32", "int32", "int64")
FORMATS = (*FLAT, "npy", "megatron", "llm.c")
_PART = 1 << 20  # ids
_PADDED = 1 << 16  # ids checked: every second is 0 if they are really twice as wide
_NPY = b"\x93NUMPY"
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_LLM_C = {20240520: "uint16", 20240801: "uint32"}  # by the first number in the header
_LLM_C_HEADER = 256  # int32


def check(file: pathlib.Path, form: str) -> None:
    """``UserError`` for a file that does not begin as this ``form`` does, before reading others, maybe for hours."""
    if form == "megatron":
        _index_header(file)
    elif form == "npy":
        _npy(file)
    elif form == "llm.c":
        _llm_c(file)
    elif file.is_file():  # a pipe can be read only once
        if _is_megatron(file.with_suffix(".idx")):
            raise UserError(f"{file} has a Megatron-LM index beside it: use --token_files=megatron")
        _refuse_headers(file, next(read_chunks(file, beginning=True), b""))


def records(file: pathlib.Path, form: str, ids: Ids) -> Iterator[Record]:
    """Parts of a stream, named file:position, or Megatron-LM's documents, file:number. ``UserError`` for a file not of this
    ``form`` or with ids that are not the tokenizer's: if one is wrong, all are."""
    if form == "megatron":
        return _megatron(file, ids)
    if form == "npy":
        return _parts(file, _npy(file), ids)
    if form == "llm.c":
        return _parts(file, _llm_c(file), ids)
    return _flat(file, form, ids)


def _parts(file: pathlib.Path, array: np.ndarray, ids: Ids) -> Iterator[Record]:
    for start in range(0, len(array), _PART):
        yield _checked(file, start, array[start : start + _PART], ids)


def _checked(file: pathlib.Path, start: int, part: np.ndarray, ids: Ids) -> Record:
    if wrong := ids.wrong(part):
        raise UserError(
            f"{file}, after {start} ids: {wrong}; were they made by another tokenizer, or do they have another dtype?"
        )
    return Record(f"{file}:{start}", None, ids=part.astype(np.uint32))


def _flat(file: pathlib.Path, form: str, ids: Ids) -> Iterator[Record]:
    dtype = np.dtype(form).newbyteorder("<")
    rest, start = b"", 0
    try:
        for chunk in read_chunks(file):
            rest += chunk
            whole = len(rest) - len(rest) % dtype.itemsize
            part, rest = np.frombuffer(rest[:whole], dtype), rest[whole:]
            if start == 0:
                _refuse_headers(file, chunk)
                checked = part[: min(len(part), _PADDED) & ~1]
                if len(checked) and part.itemsize < 8 and not checked[1::2].any() and checked[::2].any():
                    raise UserError(
                        f"every second one of the first {len(checked)} ids of {file} is 0, as if ids of "
                        f"{2 * part.itemsize} bytes or more were read as {part.itemsize} bytes; perhaps use "
                        f"--token_files={'int64' if part.itemsize == 4 else 'uint32'}"
                    )
            yield _checked(file, start, part, ids)
            start += len(part)
    except DamagedFile as error:
        yield Record(f"{file}:{start}", None, str(error), ends_file=True)
        return
    if rest:
        raise UserError(f"{file} is not a file of {form}: {len(rest)} bytes are left after {start} of them")


def _refuse_headers(file: pathlib.Path, beginning: bytes) -> None:
    """Refuses files with a header, which a flat file would silently read as tokens."""
    if len(beginning) >= 4 and int.from_bytes(beginning[:4], "little") in _LLM_C:
        raise UserError(f"{file} begins like a file of llm.c: use --token_files=llm.c")
    if beginning.startswith(_NPY):
        raise UserError(f"{file} begins like a NumPy array: use --token_files=npy")


def _npy(file: pathlib.Path) -> np.ndarray:
    _refuse_compressed(file)
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is not a NumPy array (.npy): {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file} holds several arrays (.npz); save the array of ids as .npy")
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise UserError(f"{file} is {array.dtype} {list(array.shape)}; ids must be integers in one or two dimensions")
    if not array.flags.c_contiguous:
        raise UserError(f"{file} is in column-major (Fortran) order; save it in row-major (C) order")
    return array.reshape(-1)


def _llm_c(file: pathlib.Path) -> np.ndarray:
    _refuse_compressed(file)
    header = np.fromfile(file, "<i4", _LLM_C_HEADER)
    if len(header) < _LLM_C_HEADER or int(header[0]) not in _LLM_C:
        raise UserError(
            f"{file} does not begin like a token file of llm.c; --token_files={FLAT[0]} is for a file without a header"
        )
    dtype = np.dtype(_LLM_C[int(header[0])]).newbyteorder("<")
    begin, count = 4 * _LLM_C_HEADER, int(header[2])
    if (size := file.stat().st_size) != begin + count * dtype.itemsize:
        raise UserError(f"{file} is damaged: it has {size} bytes, but its header says {begin + count * dtype.itemsize}")
    return np.memmap(file, dtype, "r", begin, count) if count else np.zeros(0, dtype)


def _index_header(file: pathlib.Path) -> tuple[np.dtype, int, int]:
    """(dtype of the ids, number of sequences, number of document boundaries)"""
    _refuse_compressed(file)
    index = file.with_suffix(".idx")
    if not _is_megatron(index):
        raise UserError(f"{file} has no Megatron-LM index {index.name} beside it")
    with index.open("rb") as stream:
        content = stream.read(_MEGATRON_HEADER.size)
    if len(content) < _MEGATRON_HEADER.size:
        raise UserError(f"{index} is damaged: it ends within its header")
    _, version, code, sequences, borders = _MEGATRON_HEADER.unpack(content)
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise UserError(
            f"{index} has version {version} and dtype {code}; only version 1 with an integer dtype can be read"
        )
    if index.stat().st_size < _MEGATRON_HEADER.size + 12 * sequences + 8 * borders:
        raise UserError(
            f"{index} is damaged: it ends before its {sequences} sequences and {borders} document boundaries"
        )
    return np.dtype(_MEGATRON_DTYPES[code]).newbyteorder("<"), sequences, borders


def _megatron(file: pathlib.Path, ids: Ids) -> Iterator[Record]:
    dtype, sequences, borders = _index_header(file)
    index = file.with_suffix(".idx")
    content, at = index.read_bytes(), _MEGATRON_HEADER.size
    lengths = np.frombuffer(content, "<i4", sequences, at).astype(np.int64)
    offsets = np.frombuffer(content, "<i8", sequences, at + 4 * sequences)
    documents = np.frombuffer(content, "<i8", borders, at + 12 * sequences)
    size = file.stat().st_size
    ends = offsets + lengths * dtype.itemsize
    within = (lengths >= 0) & (offsets >= 0) & (offsets % dtype.itemsize == 0) & (ends <= size)
    ordered = borders and documents[0] == 0 and documents[-1] == sequences and np.all(np.diff(documents) >= 0)
    if size % dtype.itemsize or not np.all(within) or not ordered:
        raise UserError(
            f"{index} is not the index of {file.name}, which has {size} bytes, or one of the two is damaged"
        )
    tokens = np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)
    starts = offsets // dtype.itemsize
    for number, (first, last) in enumerate(itertools.pairwise(documents), start=1):
        parts = [tokens[starts[i] : starts[i] + lengths[i]] for i in range(first, last)]
        ids_of_it = np.concatenate(parts) if parts else tokens[:0]
        if wrong := ids.wrong(ids_of_it):
            raise UserError(f"document {number} of {file}: {wrong}; were they made by another tokenizer?")
        yield Record(f"{file}:{number}", None, ids=ids_of_it.astype(np.uint32))


def _is_megatron(index: pathlib.Path) -> bool:
    if not index.is_file():
        return False
    with index.open("rb") as stream:
        return stream.read(len(_MEGATRON)) == _MEGATRON


def _refuse_compressed(file: pathlib.Path) -> None:
    if stripped_suffix(file) != file.suffix.lower():
        raise UserError(
            f"{file} is compressed, and only flat ids ({', '.join(FLAT)}) can be read compressed; decompress it"
        )
    if not file.is_file():
        raise UserError(
            f"{file} is a pipe, and only flat ids ({', '.join(FLAT)}) can be read from a pipe; write it to a file"
        )
