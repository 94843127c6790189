"""Which split a document belongs to, and how well the held-out text compresses."""

import concurrent.futures
import dataclasses
import hashlib
import lzma
import zlib

from jaxlinear.data.manifest import Split

COMPRESSED_TEXT_LIMIT = 100_000_000  # xz -9 takes about a minute for this much text


class Splitter:
    """Assigns a document to a split by the hash of its text, so equal documents are always in the same split."""

    def __init__(self, seed: int, heldout_fraction: float):
        self._key = seed.to_bytes(8, "little")
        self._heldout_fraction = heldout_fraction
        self.smallest, self.largest = 1.0, 0.0

    def split(self, content: bytes) -> str:
        """The name of the split that a document belongs to, from the UTF-8 bytes of its text."""
        digest = hashlib.blake2b(content, key=self._key, digest_size=8).digest()
        position = (int.from_bytes(digest, "little") >> 11) / (1 << 53)  # in [0, 1); 53 bits, exact in a float
        self.smallest, self.largest = min(self.smallest, position), max(self.largest, position)
        return "heldout" if position < self._heldout_fraction else "train"

    def nearest_fraction(self) -> str | None:
        """The fraction nearest to the current one that gives both splits a document; None if there is none."""
        if self.smallest >= self.largest:
            return None
        for digits in range(1, 18):  # the shortest decimal that is above the smallest and not above the largest
            scale = 10**digits
            up = self._heldout_fraction <= self.smallest
            f = (int(self.smallest * scale) + 1 if up else int(self.largest * scale)) / scale
            if self.smallest < f <= self.largest:
                return f"{f:.{digits}f}"
        return repr(self.largest)


def with_compressed_sizes(split: Split, text: bytearray | None) -> Split:
    """The split with the gzip and xz sizes of its ``text`` or, if that is None, a note that it was too long."""
    if text is None:
        note = f"not compressed: the text is longer than {COMPRESSED_TEXT_LIMIT} bytes"
        return dataclasses.replace(split, note=note)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # both compressors release the interpreter lock
        gzip, xz = pool.submit(zlib.compress, text, 9, 31), pool.submit(lzma.compress, text, preset=9)
    return dataclasses.replace(split, gzip_bytes=len(gzip.result()), xz_bytes=len(xz.result()))
