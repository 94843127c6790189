"""One matrix product per group of rows, with groups of any size: what a mixture of experts computes."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear.costs import flop_annotations
from jaxlinear.errors import UserError
from jaxlinear.ops import backends, dtypes
from jaxlinear.pallas.parts import derivatives, grouped_sums

BACKENDS = ("blocks", "ragged_dot", "rows", "pallas")

# Rows per block: a fraction of the mean group, within these bounds, so that little of a group's last block is wasted.
_PARTS_OF_MEAN = 4
_LEAST_BLOCK, _LARGEST_BLOCK = 8, 256
_FEW_ROWS = 8  # mean rows per group up to which a GPU uses ``rows``


def grouped_product(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, *, rows: int | None = None, backend: str = "auto"
) -> jax.Array:
    """``y[m] = x[m] @ kernels[group of m]``, summed in float32 at least.

    Backends: ``ragged_dot`` is ``jax.lax.ragged_dot``, for which TPUs have an instruction, except for the gradient of the
    kernels; for that, and on other platforms, XLA multiplies every row by every kernel. ``pallas`` is the same, but with
    that gradient computed by a TPU kernel. ``blocks`` goes through blocks of rows of one group, one after another, as many
    as there are: its work and its reads of kernels grow with the number of rows and of non-empty groups. ``rows``
    multiplies each row by its own kernel, element by element, all at once: it is for few rows on a GPU, as in decoding,
    where a loop over a data-dependent number of blocks waits for the host on each iteration. ``auto`` uses ``pallas`` on a
    TPU, ``rows`` on a GPU with up to 8 rows per group on average, else ``blocks``.

    Args:
      x: ``[M, D]``, sorted by group: the first ``sizes[0]`` rows are group 0's, and so on.
      kernels: ``[E, D, F]``; multiplied in the dtype of x; their gradient has their own.
      sizes: ``[E]`` int, each from 0 to M, together at most M.
      rows: what the sizes should add up to, M by default, for counting the products (``counted``): no result depends on it.
      backend: ``"blocks"``, ``"ragged_dot"``, ``"rows"``, ``"pallas"`` or ``"auto"``.

    Returns:
      ``[M, F]`` in the dtype of x; zeros in the rows after the last group, whose gradients are zeros too.
    """
    backends.check("grouped_product", backend, BACKENDS)
    if backend == "auto":
        few = backends.platform() == "gpu" and x.shape[0] <= _FEW_ROWS * kernels.shape[0]
        on_tpu = backends.platform() == "tpu" and 0 not in (*x.shape, *kernels.shape)
        backend = "pallas" if on_tpu else "rows" if few else "blocks"
    if backend == "pallas" and backends.platform() == "gpu":
        raise UserError("grouped_product: the kernel is for TPUs; on GPUs use backend='blocks'")
    return _product(x, kernels, sizes.astype(jnp.int32), backend, x.shape[0] if rows is None else rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x, kernels, sizes, backend, rows):
    return _forward(x, kernels, sizes, backend, rows)[0]


def _forward(x, kernels, sizes, backend, rows):
    if backend == "pallas":
        x, kernels, sizes = derivatives.once((x, kernels, sizes), "ragged_dot")
    y = _program(_functions(backend)[0], *_counts(x, kernels, sizes, backend, rows), 1)(x, kernels, sizes)
    return checkpoint_name(y, "grouped_product"), (x, kernels, sizes)


def _backward(backend, rows, residuals, dy):
    if backend == "pallas":
        residuals, dy = derivatives.once((residuals, dy), "ragged_dot")
    x, kernels, sizes = residuals
    of_rows, of_kernels = _functions(backend)
    d_x = _program(of_rows, *_counts(x, kernels, sizes, backend, rows), 2)(dy, kernels, sizes)
    counts = _counts(x, kernels, sizes, "blocks" if backend == "rows" else backend, rows)
    return d_x, _program(of_kernels, *counts, rows)(x, dy, sizes).astype(kernels.dtype), None


_product.defvjp(_forward, _backward)


def _functions(backend):
    if backend == "pallas":
        return _rows_by_ragged_dot_on_tpu, _kernels_by_pallas
    if backend == "ragged_dot":
        return _rows_by_ragged_dot, _kernels_by_ragged_dot
    return _rows_by_blocks if backend == "blocks" else _rows_one_by_one, _kernels_by_blocks


def _counts(x, kernels, sizes, backend, rows):
    """What ``counted`` is told: the fewest blocks that hold so many rows or, for other backends, the rows."""
    if backend == "blocks":
        return -(-rows // _block(x, sizes)), None
    return rows, 2 * kernels.shape[1] * kernels.shape[2] if backend == "rows" else None


@functools.lru_cache(maxsize=64)
def _program(function, runs, each, *static):
    return flop_annotations.jit(lambda *arrays: function(*arrays, *static), runs, each)


def _rows_by_blocks(x, kernels, sizes, contracted):
    """Each row times its group's kernel, over the kernels' axis ``contracted``."""
    block = _block(x, sizes)
    count, place = _blocks(x, sizes, block)

    def step(n, y):
        group, first, in_group = place(n)
        product = lax.dot_general(
            lax.dynamic_slice_in_dim(x, first, block),
            lax.dynamic_index_in_dim(kernels, group, keepdims=False).astype(x.dtype),
            (((1,), (contracted - 1,)), ((), ())),
            preferred_element_type=dtypes.wide(x.dtype),
        )
        others = lax.dynamic_slice_in_dim(y, first, block)
        return lax.dynamic_update_slice_in_dim(y, jnp.where(in_group, product.astype(y.dtype), others), first, axis=0)

    return lax.fori_loop(0, count, step, jnp.zeros_like(x, shape=(x.shape[0], kernels.shape[3 - contracted])))


def _kernels_by_blocks(x, dy, sizes, rows):
    """``[E, D, F]``: the sum over a group's rows of ``x[m]^T dy[m]``."""
    block, sum_dtype = _block(x, sizes), dtypes.wide(x.dtype)
    count, place = _blocks(x, sizes, block)

    def step(n, total):
        group, first, in_group = place(n)
        own = jnp.where(in_group, lax.dynamic_slice_in_dim(x, first, block), jnp.zeros((), x.dtype))
        product = lax.dot_general(
            own,
            lax.dynamic_slice_in_dim(dy, first, block),
            (((0,), (0,)), ((), ())),
            preferred_element_type=sum_dtype,
        )
        before = lax.dynamic_index_in_dim(total, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, before + product, group, axis=0)

    shape = (sizes.shape[0], x.shape[1], dy.shape[1])
    return lax.fori_loop(0, count, step, jnp.zeros_like(x, shape=shape, dtype=sum_dtype))


def _block(x, sizes):
    part = x.shape[0] // (_PARTS_OF_MEAN * sizes.shape[0])
    return min(x.shape[0], max(_LEAST_BLOCK, min(_LARGEST_BLOCK, part // 8 * 8)))


def _blocks(x, sizes, block):
    """The number of blocks, and a function from a block's number to its group, its first row, and which of its rows are the
    group's ``[block, 1]`` (the first row is chosen so that the block ends within x)."""
    ends, blocks = jnp.cumsum(sizes, dtype=jnp.int32), -(-sizes // block)
    blocks_through = jnp.cumsum(blocks, dtype=jnp.int32)

    def place(n):
        group = jnp.sum(blocks_through <= n, dtype=jnp.int32)
        start = ends[group] - sizes[group] + (n - blocks_through[group] + blocks[group]) * block
        first = jnp.minimum(start, x.shape[0] - block)
        rows = first + jnp.arange(block, dtype=jnp.int32)
        return group, first, ((rows >= start) & (rows < ends[group]))[:, None]

    return blocks_through[-1], place


def _rows_one_by_one(x, kernels, sizes, contracted):
    wide = dtypes.wide(x.dtype)
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    group = jnp.sum(jnp.cumsum(sizes, dtype=jnp.int32)[None] <= row, axis=1, dtype=jnp.int32)
    own = jnp.take(kernels, group, axis=0, mode="clip").astype(x.dtype).astype(wide)
    y = jnp.sum(jnp.expand_dims(x.astype(wide), 3 - contracted) * own, axis=contracted).astype(x.dtype)
    return jnp.where((group < sizes.shape[0])[:, None], y, jnp.zeros((), x.dtype))


def _rows_by_ragged_dot(x, kernels, sizes, contracted):
    return _ragged_dot(x, kernels, sizes, contracted, dtypes.wide(x.dtype))


def _rows_by_ragged_dot_on_tpu(x, kernels, sizes, contracted):
    # Its instruction sums in float32 in any case, but need not write float32 (libtpu 0.0.42).
    return _ragged_dot(x, kernels, sizes, contracted, x.dtype)


def _ragged_dot(x, kernels, sizes, contracted, dtype):
    numbers = lax.RaggedDotDimensionNumbers((((1,), (contracted,)), ((), ())), (0,), (0,))
    options = {"precision": _precision(x), "preferred_element_type": dtype}
    y = lax.ragged_dot_general(x, kernels.astype(x.dtype), sizes, numbers, **options)
    # The contents of rows that are in no group are unspecified.
    in_a_group = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(sizes, dtype=jnp.int32)
    return jnp.where(in_a_group[:, None], y.astype(x.dtype), jnp.zeros((), x.dtype))


def _kernels_by_ragged_dot(x, dy, sizes, rows):
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    options = {"precision": _precision(x), "preferred_element_type": dtypes.wide(x.dtype)}
    return lax.ragged_dot_general(x, dy, sizes, numbers, **options)


def _precision(x):
    # For bfloat16, libtpu's instruction accepts no other precision, whatever the user's default is.
    return None if x.dtype == dtypes.wide(x.dtype) else lax.Precision.DEFAULT


def _kernels_by_pallas(x, dy, sizes, rows):
    return grouped_sums.call(x, dy, sizes, dtype=dtypes.wide(x.dtype), rows=rows, target=backends.target())
