"""The gates of the RG-LRU for TPU, and what each token makes of them: one kernel each way. Backward, the gates are computed
again. ``rg_lru_equations`` has the equations."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts.lanes import SUBLANES, fill
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import block
from jaxlinear.pallas.rg_lru.bands import Bytes, Shape, bands_of, blocks_of, fit, shape_of
from jaxlinear.pallas.rg_lru.call import GROUP, IN_TIME, MARKS, Order, call, on_lanes


def forward(
    x: jax.Array, kernels: jax.Array, vectors: jax.Array, first: jax.Array, *, target: Target
) -> tuple[jax.Array, jax.Array]:
    """a and u ``[B, T, R]`` in the dtype of ``vectors``, the one to compute in.

    Args:
      x: ``[B, T, R]``.
      kernels: ``[2, N, K, K]``, the blocks of W_a and of W_x, multiplied in the dtype of x.
      vectors: ``[3, R]``: b_a, b_x and the rate.
      first: ``[B, T]`` bool, the first tokens of documents.
      target: "tpu" or, to interpret the kernel, another.
    """
    shape = shape_of(x, kernels, _needed(x.dtype.itemsize), target)
    inputs = [(x, IN_TIME), (bands_of(kernels.astype(x.dtype), shape), GROUP), (vectors, GROUP), (first, MARKS)]
    outputs = [(x.shape, vectors.dtype, IN_TIME)] * 2
    order = Order(backwards=False, one_by_one=0)
    a, u = call(_forward, "rg_lru_gates_forward", shape, order, inputs, outputs, [on_lanes(shape)], 1, target)
    return a, u


def gradient(
    x: jax.Array,
    kernels: jax.Array,
    vectors: jax.Array,
    first: jax.Array,
    d_a: jax.Array,
    d_u: jax.Array,
    *,
    target: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of x, ``kernels`` and ``vectors``, from those of ``forward``'s outputs."""
    shape, wide = shape_of(x, kernels, _needed(x.dtype.itemsize), target), vectors.dtype
    bands = bands_of(jnp.concatenate([kernels, kernels.swapaxes(2, 3)]).astype(x.dtype), shape)
    of_time = [(x, IN_TIME), (d_a, IN_TIME), (d_u, IN_TIME)]
    inputs = [*of_time, (bands, GROUP), (vectors, GROUP), (first, MARKS)]
    outputs = [
        (x.shape, x.dtype, IN_TIME),
        ((2, *bands.shape[1:]), wide, GROUP),
        ((SUBLANES * len(vectors), shape.width), wide, GROUP),
    ]
    of_block = shape.time, shape.group
    scratch = [on_lanes(shape), pltpu.VMEM((2, *of_block), x.dtype), pltpu.VMEM(of_block, wide)]
    order = Order(backwards=False, one_by_one=2)
    d_x, d_bands, sums = call(_gradient, "rg_lru_gates_gradient", shape, order, inputs, outputs, scratch, 3, target)
    d_vectors = jnp.sum(sums.reshape(len(vectors), SUBLANES, -1), axis=1)
    return d_x, blocks_of(d_bands, shape).astype(kernels.dtype), d_vectors


def fits(width: int, block: int, size: int) -> bool:
    """Whether VMEM has room for the blocks of ``block`` channels among ``width``, with numbers of ``size`` bytes."""
    return fit(width, block, _needed(size))


def _needed(size: int) -> Bytes:
    """By the gradient, also for the forward pass. Arrays that are streamed are there twice."""
    wide = max(4, size)
    x, d_a, d_u, d_x = size, wide, wide, size
    return Bytes(2 * (x + d_a + d_u + d_x) + 2 * size + wide, 2 * (4 * size + 2 * wide))


def _forward(shape: Shape, x, bands, vectors, first, a, u, marks) -> None:
    block.forward(shape, x, bands, vectors, first, marks, a, u)


def _gradient(shape: Shape, x, d_a, d_u, bands, vectors, first, d_x, d_bands, sums, marks, d_z, of_x) -> None:
    gradients = block.Gradients(d_bands, sums, d_z, of_x)
    gradients.begin()
    fill(marks, first)

    def rows(at):
        is_first = marks[at] > 0
        for tile in shape.tiles:
            gates = block.of_tokens(x, bands, vectors, at, tile)
            gradients.collect(gates, d_a[at, tile.lanes], d_u[at, tile.lanes], is_first, vectors, at, tile)

    block.each(shape.time, rows)
    gradients.multiply(shape, x, bands, d_x)
