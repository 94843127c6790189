"""Files that may be compressed (.gz, .zst), read in chunks; damage is one exception, whatever the format."""

import contextlib
import functools
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxlinear.errors import UserError

_CHUNK = 1 << 20
_SUFFIXES = (".gz", ".zst")
_ZSTD_WINDOW = 1 << 31  # bytes, the largest possible (zstd --long=31); the default maximum is 128 MiB


class DamagedFile(Exception):
    """A compressed file that ends too early or whose content does not match its name."""


def stripped_suffix(file: pathlib.Path) -> str:
    """The suffix that shows the content: ``.txt`` for a.txt, ``.jsonl`` for a.jsonl.gz."""
    suffix = file.suffix.lower()
    return pathlib.Path(file.stem).suffix.lower() if suffix in _SUFFIXES else suffix


def expansion(file: pathlib.Path) -> float:
    """Ratio of content to file size, estimated from the beginning; 1 for a file that is not compressed."""
    read = min(file.stat().st_size, _CHUNK)
    if not read or file.suffix.lower() not in _SUFFIXES:
        return 1.0
    found = 0
    with contextlib.suppress(DamagedFile):
        for content in read_chunks(file, beginning=True):
            found += len(content)
    return max(found, 1) / read


def read_chunks(file: pathlib.Path, *, beginning: bool = False) -> Iterator[bytes]:
    """The decompressed content, or the part of it in the file's first chunk. Raises DamagedFile after the last chunk that
    could be read."""
    suffix = file.suffix.lower()
    new, failure = _decompressor(file)
    if new is None:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
                if beginning:
                    return
        return
    decompressor, padding = None, b""
    with file.open("rb") as stream:
        while data := stream.read(_CHUNK):
            # A file may consist of several gzip members or zstd frames.
            while data:
                if decompressor is None and not (data := data.lstrip(padding)):
                    break
                decompressor = decompressor or new()
                try:
                    content = decompressor.decompress(data)
                except failure as error:
                    raise DamagedFile(f"damaged {suffix} file: {error}") from error
                if content:
                    yield content
                data = b""
                if decompressor.eof:
                    data, decompressor = decompressor.unused_data, None
                    padding = b"\0" if suffix == ".gz" else b""  # left out by gzip too; tapes add it
            if beginning:
                return
    if decompressor is not None:
        raise DamagedFile(f"damaged {suffix} file: it is truncated")


def _decompressor(file: pathlib.Path) -> tuple[Callable[[], Any] | None, type[Exception]]:
    """(a function that makes a decompressor, the error it raises); (None, ...) for a file that is not compressed."""
    if file.suffix.lower() == ".gz":
        return functools.partial(zlib.decompressobj, wbits=31), zlib.error
    if file.suffix.lower() == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{file} needs the zstandard package: pip install zstandard") from error
        return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj, zstandard.ZstdError
    return None, DamagedFile
