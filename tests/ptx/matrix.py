"""Instructions of one warp, or of four together: matrices spread over their threads' registers, or in shared memory.

Layouts are those of the figures in "Matrix multiply-accumulate operations" of the PTX ISA, and of the descriptors of
"Asynchronous warpgroup-level matrix instructions".
"""

import re

import ml_dtypes
import numpy as np

from tests.ptx import Fault
from tests.ptx.memory import MATRIX_UNIT, Threads

_LANE = np.arange(32)
_GROUP, _MEMBER = _LANE // 4, _LANE % 4


def _registers(arrays: list[np.ndarray]) -> np.ndarray:
    """``[warps, 32, registers]``"""
    return np.stack(arrays, axis=-1).reshape(-1, 32, len(arrays))


def _narrow(arrays: list[np.ndarray]) -> np.ndarray:
    """Two numbers per register: ``[warps, 32, registers, 2]``"""
    registers = _registers(arrays)
    return np.ascontiguousarray(registers).view(ml_dtypes.bfloat16).reshape(*registers.shape, 2).astype(np.float32)


def _of_16_rows(x: np.ndarray) -> np.ndarray:
    """``[warps, 32, 4, 2]`` -> ``[warps, 16, 16]``"""
    found = np.zeros((len(x), 16, 16), np.float32)
    for i in range(4):
        for half in range(2):
            found[:, _GROUP + 8 * (i % 2), 2 * _MEMBER + half + 8 * (i // 2)] = x[:, :, i, half]
    return found


def _of_19_bits(words: np.ndarray) -> np.ndarray:
    """Drops the last 13 bits; NaN stays NaN, whichever bits make it."""
    numbers = words.view(np.float32)
    return np.where(numbers != numbers, numbers, (words & np.uint32(0xFFFFE000)).view(np.float32))


def _wide(arrays: list[np.ndarray]) -> np.ndarray:
    """One number per register, whose last 13 bits are not read: ``[warps, 32, registers]``"""
    return _of_19_bits(_registers(arrays))


def _of_16_rows_wide(arrays: list[np.ndarray]) -> np.ndarray:
    """Four registers -> ``[warps, 16, 8]``"""
    numbers = _wide(arrays)
    found = np.zeros((len(numbers), 16, 8), np.float32)
    for i in range(4):
        found[:, _GROUP + 8 * (i % 2), _MEMBER + 4 * (i // 2)] = numbers[:, :, i]
    return found


def _rows_and_columns(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each register lies in a warp's 16 rows of sums, ``[32, registers]``."""
    i = np.arange(count)
    return _GROUP[:, None] + 8 * (i // 2 % 2), 2 * _MEMBER[:, None] + i % 2 + 8 * (i // 4)


def mma(opcode: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    if "m16n8k16.row.col.f32.bf16.bf16.f32" in opcode:
        left, right, pairs = _of_16_rows(_narrow(a)), np.zeros((len(a[0]) // 32, 16, 8), np.float32), _narrow(b)
        for i in range(2):
            for half in range(2):
                right[:, 2 * _MEMBER + half + 8 * i, _GROUP] = pairs[:, :, i, half]
    elif "m16n8k8.row.col.f32.tf32.tf32.f32" in opcode:
        left, right, numbers = _of_16_rows_wide(a), np.zeros((len(a[0]) // 32, 8, 8), np.float32), _wide(b)
        for i in range(2):
            right[:, _MEMBER + 4 * i, _GROUP] = numbers[:, :, i]
    else:
        raise NotImplementedError(opcode)
    rows, columns = _rows_and_columns(4)
    with np.errstate(all="ignore"):
        sums = (left @ right)[:, rows, columns] + _registers(c)
    return [sums[..., i].reshape(-1) for i in range(4)]


def load_matrices(count: int, transposed: bool, addresses: np.ndarray, shared, threads: Threads) -> list[np.ndarray]:
    rows = _of_threads(addresses, count), _of_threads(threads, count)
    halves = shared.values(shared.read(rows[0], 16, rows[1])).reshape(-1, count, 8, 8)
    found = []
    for i in range(count):
        pair = halves[:, i, 2 * _MEMBER[:, None] + np.arange(2), _GROUP[:, None]]
        if not transposed:
            pair = halves[:, i, _GROUP[:, None], 2 * _MEMBER[:, None] + np.arange(2)]
        found.append(np.ascontiguousarray(pair).view(np.uint32).reshape(-1))
    return found


def store_matrices(transposed: bool, addresses: np.ndarray, values: list[np.ndarray], shared, threads: Threads) -> None:
    count, registers = len(values), _registers(values)
    pairs = np.ascontiguousarray(registers).view(np.uint16).reshape(-1, 32, count, 2)
    halves = np.zeros((len(pairs), count, 8, 8), np.uint16)
    for half in range(2):
        at = (2 * _MEMBER + half, _GROUP) if transposed else (_GROUP, 2 * _MEMBER + half)
        halves[:, :, at[0], at[1]] = np.moveaxis(pairs[..., half], 1, 2)
    shared.store(_of_threads(addresses, count), halves.reshape(-1, 8), _of_threads(threads, count))


def _of_threads(x, count: int):
    """Of each warp, the threads that give the row addresses of ``count`` matrices."""
    if isinstance(x, Threads):
        return Threads(*(_of_threads(y, count) for y in x))
    return x.reshape(-1, 32)[:, : 8 * count].reshape(-1)


class Product:
    """``wgmma.mma_async``: 64 rows by four warps."""

    def __init__(self, opcode: str):
        found = re.search(r"m64n(\d+)k(16\.f32\.bf16\.bf16|8\.f32\.tf32\.tf32)$", opcode)
        if not found:
            raise NotImplementedError(opcode)
        self.columns, self._of_32_bits = int(found[1]), opcode.endswith("tf32")
        self.read: list[tuple[np.ndarray, Threads]] = []  # where the operands lie

    def left(self, operand, transposed: bool, shared, threads: Threads) -> np.ndarray:
        """``[groups, 64, 16]`` from registers or a descriptor's array; with 32 bits ``[groups, 64, 8]``."""
        if isinstance(operand, list):
            found = _of_16_rows_wide(operand) if self._of_32_bits else _of_16_rows(_narrow(operand))
            return found.reshape(-1, 64, found.shape[-1])
        return self._described(operand, 64, transposed, shared, threads)

    def right(self, descriptor: np.ndarray, transposed: bool, shared, threads: Threads) -> np.ndarray:
        """``[groups, 16, columns]``, with 32 bits ``[groups, 8, columns]``"""
        return self._described(descriptor, self.columns, transposed, shared, threads).swapaxes(1, 2)

    def sums(self, product: np.ndarray) -> list[np.ndarray]:
        """The sums by register of the threads."""
        rows, columns = _rows_and_columns(self.columns // 2)
        found = product.reshape(-1, 16, self.columns)[:, rows, columns]
        return [found[..., i].reshape(-1) for i in range(self.columns // 2)]

    def _described(self, descriptor: np.ndarray, rows: int, transposed: bool, shared, threads: Threads) -> np.ndarray:
        groups = descriptor.reshape(-1, 128)
        if (groups != groups[:, :1]).any():
            raise Fault("threads of a warpgroup describe different operands")
        word = groups[:, 0].astype(np.int64)
        first, leading, stride = ((word >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        mode = word >> 62 & 3
        if (mode != mode[0]).any() or (word >> 49 & 7).any():
            raise NotImplementedError("operands of several swizzles, or with a base offset")
        # In bytes of the swizzle's rows. Without one they are those of the core matrices.
        width = {0: 16, 1: 128, 2: 64, 3: 32}[int(mode[0])]
        if transposed:  # eight rows of the operand in 16 bytes, at each step of the sum
            row, step = np.arange(0, rows, 8)[:, None], np.arange(16)
            across, along = (stride, leading) if width == 16 else (leading, stride)
            offset = 2 * row % width + step % 8 * width
            at = (
                first[:, None, None]
                + 2 * row // width * across[:, None, None]
                + step // 8 * along[:, None, None]
                + offset
            )
        else:  # eight steps in 16 bytes, of each row
            row, step = np.arange(rows)[:, None], np.arange(2)
            at = first[:, None, None] + row // 8 * stride[:, None, None] + row % 8 * width
            at = at + step * (leading[:, None, None] if width == 16 else 16)
        if width > 16:
            at = at ^ ((at >> 7 & (width // 16 - 1)) << 4)
        count = at[0].size
        leaders = [np.repeat(x.reshape(-1, 128)[:, 0], count) for x in threads]
        who = Threads(*leaders)._replace(warp=np.full(len(word) * count, MATRIX_UNIT))
        halves = shared.begin_product(at.reshape(-1), 16, who)
        self.read.append((halves, who))
        if self._of_32_bits:
            words = np.ascontiguousarray(shared.values(halves)).view(np.uint32)
            return _of_19_bits(words).reshape(len(word), rows, 8)
        found = shared.values(halves).view(ml_dtypes.bfloat16).reshape(*at.shape, 8).astype(np.float32)
        if transposed:  # [groups, rows / 8, 16, 8]
            return found.swapaxes(2, 3).reshape(len(word), rows, 16)
        return found.reshape(len(word), rows, 16)
