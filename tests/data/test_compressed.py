"""Compressed files: several members, damage, the largest window."""

import gzip

import pytest
import zstandard

from jaxlinear.data.compressed import DamagedFile, read_chunks
from tests.data.test_sources import PACK


def test_several_members_and_damage(tmp_path):
    for suffix, pack in PACK.items():
        file = tmp_path / f"a{suffix}"
        file.write_bytes(pack(b"one ") + pack(b"two"))
        assert b"".join(read_chunks(file)) == b"one two"
        file.write_bytes(b"this is not compressed at all")
        with pytest.raises(DamagedFile, match=f"damaged {suffix} file"):
            b"".join(read_chunks(file))


def test_padding_after_a_gzip_member_is_no_damage(tmp_path):
    """As of tapes: zeros, also more than are read at once, before another member or none. Before the first they are damage,
    and so is what is neither."""
    one, two, zeros = gzip.compress(b"one "), gzip.compress(b"two"), bytes((1 << 20) + 5)
    file = tmp_path / "a.gz"
    whole = (one + bytes(9), b"one "), (one + zeros, b"one "), (one + zeros + two + zeros, b"one two")
    for content, expected in whole:
        file.write_bytes(content)
        assert b"".join(read_chunks(file)) == expected
    for content in (bytes(9) + one, bytes(9), one + bytes(9) + b"x", one[:-1], one + bytes(9) + two[:-1]):
        file.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"damaged \.gz file"):
            b"".join(read_chunks(file))


def test_zstandard_of_the_largest_window(tmp_path):
    """As ``zstd --long=31`` writes it; the library's default limit is 27."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # without the size
    (tmp_path / "a.zst").write_bytes(packer.compress(b"one") + packer.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.zst").read_bytes()).window_size == 1 << 31
    assert b"".join(read_chunks(tmp_path / "a.zst")) == b"one"
