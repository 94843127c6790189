"""Products of 32-bit numbers, whose last 13 bits are not read, against NumPy's. Those of 16 bits are in all our kernels
(``tests/pallas/test_on_an_emulated_gpu.py``)."""

import numpy as np

from tests.ptx import matrix, memory


def cut(x):
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def test_of_a_warp():
    """Registers as in "Matrix Fragments for mma.m16n8k8": a thread's row is a quarter of its lane."""
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    lane = np.arange(32)
    row, column = lane // 4, lane % 4
    left = [a[row + 8 * i, column + 4 * j].view(np.uint32) for j in range(2) for i in range(2)]
    right = [b[column + 4 * i, row].view(np.uint32) for i in range(2)]
    sums = [c[row + 8 * i, 2 * column + j] for i in range(2) for j in range(2)]
    found = matrix.mma("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", left, right, sums)
    expected = cut(a) @ cut(b) + c
    for n, values in enumerate(found):
        np.testing.assert_allclose(values, expected[row + 8 * (n // 2), 2 * column + n % 2], rtol=1e-6, atol=1e-6)


def test_of_a_warpgroup_from_shared_memory():
    """Without a swizzle: core matrices of 8 rows of 16 bytes; the two in a row of the operand are 128 bytes apart, and each
    8 rows 256 bytes from the next."""
    random, columns = np.random.default_rng(1), 16
    a, b = (random.standard_normal((rows, 8)).astype(np.float32) for rows in (64, columns))
    shared, one = memory.Shared(1, strict=True), np.zeros(1, np.int64)

    def describe(x, first):
        for i, row in enumerate(x):
            for half in range(2):
                at = memory.SHARED_BASE + first + i // 8 * 256 + half * 128 + i % 8 * 16
                shared.store(
                    np.array([at]), row[None, 4 * half : 4 * half + 4].copy(), memory.Threads(one, one, one, one)
                )
        word = (memory.SHARED_BASE + first) >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32
        return np.full(128, word, np.uint64)

    left, right = describe(a, 0), describe(b, 4096)
    threads = memory.Threads(*(np.full(128, x) for x in (0, 0, 1, 0)))  # after a barrier
    shared.fence(threads)
    product = matrix.Product(f"wgmma.mma_async.sync.aligned.m64n{columns}k8.f32.tf32.tf32")
    x = product.left(left, False, shared, threads)
    y = product.right(right, False, shared, threads)
    np.testing.assert_array_equal(x[0], cut(a))
    np.testing.assert_array_equal(y[0], cut(b).T)
    warp, row, column = np.arange(128) // 32, np.arange(128) % 32 // 4, np.arange(128) % 4
    registers = [a[16 * warp + row + 8 * i, column + 4 * j].view(np.uint32) for j in range(2) for i in range(2)]
    np.testing.assert_array_equal(product.left(registers, False, shared, threads)[0], cut(a))
