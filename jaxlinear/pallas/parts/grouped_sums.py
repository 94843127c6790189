"""``y[e] = sum over the rows m of group e of x[m]^T dy[m]`` for TPU, the gradient of the matrices of a grouped product.

``jax.lax.ragged_dot_general`` has an instruction for the product, but none for this gradient (libtpu 0.0.42): for every
group XLA computes a product with all rows. Here a step of the grid adds a block of rows to the sum of one group, and a
group has as many steps as it has blocks with rows of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts.target import Target

_ROWS = 256  # of a block
_SIDE = 1024  # largest side of the part of a sum that a step adds to


def call(x: jax.Array, dy: jax.Array, sizes: jax.Array, *, dtype: jnp.dtype, rows: int, target: Target) -> jax.Array:
    """``[E, D, F]``, summed in ``dtype``, from ``[M, D]`` and ``[M, F]`` sorted by group. ``sizes`` ``[E]`` should add up
    to ``rows``, which sets the reported cost."""
    (count, width), inner, groups = x.shape, dy.shape[1], sizes.shape[0]
    block, sides = min(count, _ROWS), (_side(width), _side(inner))
    steps, schedule = _schedule(sizes, count, block)
    tiles = pl.cdiv(width, sides[0]), pl.cdiv(inner, sides[1])

    def of_rows(axis):
        return lambda *at: (at[4][at[2]], at[axis])

    return pl.pallas_call(
        functools.partial(_kernel, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(*tiles, steps),
            in_specs=[pl.BlockSpec((block, sides[0]), of_rows(0)), pl.BlockSpec((block, sides[1]), of_rows(1))],
            out_specs=pl.BlockSpec((None, *sides), lambda i, j, n, of, *_: (of[n], i, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((groups, width, inner), dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * width * inner,
            transcendentals=0,
            bytes_accessed=rows * (width * tiles[1] + inner * tiles[0]) * x.dtype.itemsize
            + groups * width * inner * jnp.dtype(dtype).itemsize,
        ),
        name="grouped_sums",
        interpret=target.interpret,
    )(*schedule, x, dy)


def _side(size: int) -> int:
    """As few parts as possible, as even as possible."""
    if size <= _SIDE:
        return size
    tiles = pl.cdiv(size, 128)
    return 128 * pl.cdiv(tiles, pl.cdiv(tiles, _SIDE // 128))


def _schedule(sizes: jax.Array, count: int, block: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The number of steps; for each step its group and its block of rows; for each group its first row and its end. A group
    without rows has one step, which sets its sum to zero."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    first = jnp.minimum(starts // block, pl.cdiv(count, block) - 1)
    steps = jnp.where(sizes > 0, (ends - 1) // block - first + 1, 1)
    through = jnp.cumsum(steps, dtype=jnp.int32)
    number = jnp.arange(pl.cdiv(count, block) + len(sizes), dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(through[None] <= number[:, None], axis=1, dtype=jnp.int32), len(sizes) - 1)
    at = jnp.minimum(first[group] + number - (through - steps)[group], pl.cdiv(count, block) - 1)
    return through[-1], (group, at, starts, ends)


def _kernel(group, at, starts, ends, x, dy, y, *, block):
    step = pl.program_id(2)
    own, first = group[step], at[step] * block
    start, end = starts[own], ends[own]

    @pl.when((step == 0) | (own != group[jnp.maximum(step - 1, 0)]))
    def _():
        y[...] = jnp.zeros_like(y)

    def add(left, right):
        # float32 uses the same precision as products with parameters; for bfloat16 Mosaic accepts only the default.
        precision = None if left.dtype == y.dtype else jax.lax.Precision.DEFAULT
        dimensions = ((0,), (0,)), ((), ())
        y[...] += jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=y.dtype)

    whole = (start <= first) & (first + block <= end)

    @pl.when(whole)
    def _():
        add(x[...], dy[...])

    @pl.when(~whole)
    def _():
        def own_rows(ref):
            row = first + jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0)
            return jnp.where((row >= start) & (row < end), ref[...], jnp.zeros((), ref.dtype))

        add(own_rows(x), own_rows(dy))
