"""The memories of a GPU. They refuse what a GPU would refuse, use of memory by a warp, a copy or a product while another
may change it, and changes while another may use it."""

from typing import NamedTuple

import numpy as np

from tests.ptx import Fault

GLOBAL_BASE = 1 << 24  # the first address
SHARED_BASE = 1 << 10
SHARED_BYTES = 227 * 1024  # that a block may have on an H100
_UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


MATRIX_UNIT = 15  # its number as a warp


class Threads(NamedTuple):
    """The threads of an access: the block of each, counted among those that run together, its warp, how many barriers its
    block has passed, and the block's number among all."""

    block: np.ndarray
    warp: np.ndarray
    epoch: np.ndarray
    number: np.ndarray


def _refuse(wrong: np.ndarray, what: str, threads: Threads) -> None:
    if wrong.any():
        first = int(np.argmax(wrong.reshape(len(threads.block), -1).any(axis=1)))
        raise Fault(
            f"{what}: block {threads.number[first]}, warp {threads.warp[first]}, {int(wrong.sum())} such accesses"
        )


def _laid_out(arrays: list[np.ndarray]) -> tuple[list[int], int]:
    """The addresses of arrays, with gaps between them, and where the last ends, counted from ``GLOBAL_BASE``."""
    addresses, end = [], 256
    for array in arrays:
        addresses.append(GLOBAL_BASE + end)
        end += -(-array.nbytes // 256) * 256 + 256
    return addresses, end


def _part(address: int, array: np.ndarray) -> slice:
    return slice(address - GLOBAL_BASE, address - GLOBAL_BASE + array.nbytes)


class Global:
    """Arrays, some read and others written: each written byte by one warp, or by several with the same value."""

    def __init__(self, read: list[np.ndarray], written: list[np.ndarray]):
        self.addresses, end = _laid_out([*read, *written])
        self._data, self._array = np.zeros(end, np.uint8), np.full(end, -1, np.int16)
        self._first_written = len(read)
        for i, (array, address) in enumerate(zip((*read, *written), self.addresses, strict=True)):
            at = _part(address, array)
            self._array[at] = i
            if i < self._first_written:
                self._data[at] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._writer = np.full(end, -1, np.int32)

    def load(self, addresses: np.ndarray, unit: int, count: int, threads: Threads) -> np.ndarray:
        """``[lanes, count]`` of ``unit`` bytes each."""
        at = self._at(addresses, unit * count, threads)
        _refuse(self._array[at] >= self._first_written, "reads what the kernel writes", threads)
        return self._data.view(_UNITS[unit])[(at // unit)[:, None] + np.arange(count)]

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        unit, count = values.dtype.itemsize, values.shape[1]
        at = self._at(addresses, unit * count, threads)
        _refuse(self._array[at] < self._first_written, "writes what the kernel is given", threads)
        units, data = (at // unit)[:, None] + np.arange(count), self._data.view(values.dtype)
        before = data[units]
        warp = (threads.number * 32 + threads.warp)[:, None]
        for byte in range(unit):
            writer = self._writer[units * unit + byte]
            differs = (writer >= 0) & (writer != warp) & (before != values)
            of_block = writer // 32 == warp // 32
            _refuse(differs & ~of_block, "writes what another block wrote", threads)
            _refuse(differs & of_block, "writes what another warp wrote", threads)
            self._writer[units * unit + byte] = warp
        data[units] = values
        _refuse(data[units] != values, "two threads write different numbers at once", threads)

    def arrays(self, like: list[np.ndarray]) -> list[np.ndarray]:
        """The arrays that the kernel writes."""
        found = []
        for array, address in zip(like, self.addresses[self._first_written :], strict=True):
            at = _part(address, array)
            if (self._writer[at] < 0).any():
                raise Fault(f"{int((self._writer[at] < 0).sum())} of {array.nbytes} bytes of an output are not written")
            found.append(self._data[at].copy().view(array.dtype).reshape(array.shape))
        return found

    def _at(self, addresses: np.ndarray, size: int, threads: Threads) -> np.ndarray:
        at = addresses.astype(np.int64) - GLOBAL_BASE
        _refuse((at < 0) | (at + size > len(self._data)), "an address of no array", threads)
        _refuse(at % size != 0, f"an address that is not a multiple of {size}", threads)
        array = self._array[at]
        _refuse((array < 0) | (array != self._array[at + size - 1]), "an address beyond an array", threads)
        return at


class Plain:
    """The bytes of all arrays, which any thread may read and write; ``read`` and ``written`` say which were."""

    def __init__(self, arrays: list[np.ndarray]):
        self.addresses, end = _laid_out(arrays)
        self._bytes, self._known = np.zeros(end, np.uint8), np.zeros(end, bool)
        self.read, self.written = np.zeros(end, bool), np.zeros(end, bool)
        for address, array in zip(self.addresses, arrays, strict=True):
            self._bytes[_part(address, array)] = array.reshape(-1).view(np.uint8)
            self._known[_part(address, array)] = True

    def load(self, addresses: np.ndarray, unit: int, count: int, threads: Threads) -> np.ndarray:
        at = self._at(addresses, unit * count, threads)
        self.read[at] = True
        return np.ascontiguousarray(self._bytes[at]).view(_UNITS[unit])

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        at = self._at(addresses, values.nbytes // len(values), threads)
        self._bytes[at], self.written[at] = np.ascontiguousarray(values).view(np.uint8), True

    def give(self, arrays: list[np.ndarray]) -> None:
        """Copies the present contents to the arrays."""
        for address, array in zip(self.addresses, arrays, strict=True):
            array.reshape(-1).view(np.uint8)[:] = self._bytes[_part(address, array)]

    def _at(self, addresses: np.ndarray, size: int, threads: Threads) -> np.ndarray:
        at = addresses.astype(np.int64) - GLOBAL_BASE
        _refuse((at < 0) | (at + size > len(self._known)), "an address of no array", threads)
        _refuse(at % size != 0, f"an address that is not a multiple of {size}", threads)
        at = at[:, None] + np.arange(size)
        _refuse(~self._known[at], "an address of no array", threads)
        return at


class Shared:
    """The shared memories of all blocks. Writes and reads since the last barrier are tracked per half word."""

    def __init__(self, blocks: int, strict: bool):
        self._strict, self._halves = strict, SHARED_BYTES // 2
        self._data = np.full(blocks * self._halves, 0xFFFF, np.uint16)  # NaN
        shape = self._data.shape
        self._written, self._writer = np.full(shape, -1, np.int32), np.zeros(shape, np.int8)
        self._read, self._readers = np.full(shape, -1, np.int32), np.zeros(shape, np.uint16)
        self._unfenced = np.zeros(shape, bool)
        self._copied_to = np.zeros(shape, bool)  # by copies in flight
        self._multiplied = np.zeros(shape, bool)  # by products in flight
        self._end = 0  # the end of what any block has used

    def load(self, addresses: np.ndarray, unit: int, count: int, threads: Threads) -> np.ndarray:
        """``[lanes, count]`` of ``unit`` bytes each."""
        halves = self.read(addresses, unit * count, threads)
        return self._data[halves].view(_UNITS[unit])

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        halves = self._at(addresses, values.nbytes // len(values), threads)
        self._write(halves, np.ascontiguousarray(values).view(np.uint16), threads)

    def read(self, addresses: np.ndarray, size: int, threads: Threads) -> np.ndarray:
        """The places of ``size`` bytes starting at each address."""
        halves = self._at(addresses, size, threads)
        _refuse(self._copied_to[halves], "reads what a copy may still write", threads)
        self.mark_read(halves, threads)
        written, same = self._written[halves], self._writer[halves] == threads.warp[:, None]
        _refuse(written < 0, "reads shared memory that nothing wrote", threads)
        now = (written == threads.epoch[:, None]) & ~same
        _refuse(now, "reads what another warp writes before any barrier", threads)
        return halves

    def begin_product(self, addresses: np.ndarray, size: int, threads: Threads) -> np.ndarray:
        """Like ``read``, but by a matrix unit at any time from now on."""
        halves = self.read(addresses, size, threads)
        unfenced = self._strict & self._unfenced[halves]
        _refuse(unfenced, "a matrix unit reads what no proxy fence follows", threads)
        self._multiplied[halves] = True
        return halves

    def end_products(self, ended: list[tuple[np.ndarray, Threads]], others: list[np.ndarray]) -> None:
        """``others``: what the products still in flight read."""
        for halves, threads in ended:
            if self._strict:
                self.mark_read(halves, threads)
            self._multiplied[halves] = False
        for halves in others:
            self._multiplied[halves] = True

    def values(self, halves: np.ndarray) -> np.ndarray:
        return self._data[halves]

    def mark_read(self, halves: np.ndarray, threads: Threads) -> None:
        epoch = np.broadcast_to(threads.epoch[:, None], halves.shape)
        self._readers[halves] = np.where(self._read[halves] == epoch, self._readers[halves], 0).astype(np.uint16)
        self._read[halves] = epoch
        for warp in np.unique(threads.warp):
            self._readers[halves[threads.warp == warp]] |= np.uint16(1 << warp)

    def begin_copy(self, addresses: np.ndarray, size: int, threads: Threads) -> np.ndarray:
        """The places where a copy will write at any time from now on."""
        halves = self._at(addresses, size, threads)
        self._refuse_write(halves, threads)
        now = (self._written[halves] == threads.epoch[:, None]) & (self._writer[halves] != threads.warp[:, None])
        _refuse(now, "copies to where another warp writes before any barrier", threads)
        self._copied_to[halves] = True
        return halves

    def end_copy(self, halves: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        self._copied_to[halves] = False
        self._write(halves, values, threads)

    def fence(self, threads: Threads) -> None:
        """Covers what these warps wrote, and what was written before the last barrier of their blocks."""
        for block in np.unique(threads.block):
            of_block = threads.block == block
            part = slice(block * self._halves, block * self._halves + self._end)
            mine = np.isin(self._writer[part], np.unique(threads.warp[of_block]))
            self._unfenced[part] &= ~(mine | (self._written[part] < threads.epoch[of_block][0]))

    def _refuse_write(self, halves: np.ndarray, threads: Threads) -> None:
        others = self._readers[halves] & ~(1 << threads.warp.astype(np.uint16))[:, None]
        now = self._read[halves] == threads.epoch[:, None]
        _refuse(now & (others != 0), "writes what another warp reads before any barrier", threads)
        _refuse(self._strict & self._multiplied[halves], "writes what a product may still read", threads)
        _refuse(self._copied_to[halves], "writes where a copy may still write", threads)

    def _write(self, halves: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        self._refuse_write(halves, threads)
        now = (self._written[halves] == threads.epoch[:, None]) & (self._writer[halves] != threads.warp[:, None])
        _refuse(now & (self._data[halves] != values), "writes what another warp writes before any barrier", threads)
        self._data[halves] = values
        _refuse(self._data[halves] != values, "two threads write different numbers at once", threads)
        self._written[halves] = threads.epoch[:, None]
        self._writer[halves] = threads.warp[:, None]
        self._unfenced[halves] = True

    def _at(self, addresses: np.ndarray, size: int, threads: Threads) -> np.ndarray:
        if size % 2:
            raise NotImplementedError("bytes of shared memory")
        at = addresses.astype(np.int64) - SHARED_BASE
        _refuse((at < 0) | (at + size > SHARED_BYTES), "an address beyond shared memory", threads)
        _refuse(at % size != 0, f"an address that is not a multiple of {size}", threads)
        self._end = max(self._end, (int(at.max()) + size) // 2)
        return (threads.block * self._halves + at // 2)[:, None] + np.arange(size // 2)
