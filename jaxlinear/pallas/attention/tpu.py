"""Causal softmax attention for TPU, full or windowed, by JAX's splash attention: forward and backward.

It works on blocks of queries against blocks of keys, and only on those in which some query sees some key.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxlinear.costs import flop_annotations
from jaxlinear.pallas.attention import blocks
from jaxlinear.pallas.parts import derivatives
from jaxlinear.pallas.parts.target import Target

SAVED = "attention"  # the name by which rematerialisation policies know the outputs and the logs of the sums of weights


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, runs: jax.Array | None, *, window: int, scale: float, target: Target
) -> jax.Array:
    """As ``jaxlinear.pallas.attention.kernel.attention``."""
    (batch, length, heads), keys = q.shape[:3], k.shape[1]
    dtype = functools.reduce(np.promote_types, (q.dtype, k.dtype, v.dtype))
    block = blocks.tpu(target.kind, length, window, max(q.shape[3], v.shape[3]), dtype.itemsize)
    # Whole blocks of both, and for every query its own key. Padding is seen only by queries after the end.
    queries = -(-length // block) * block
    padded = -(-(keys - length + queries) // block) * block
    scaled = (q.astype(jnp.float32) * scale).astype(dtype)
    q, k, values = (
        jnp.pad(x.astype(dtype), ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)
        for x, size in ((scaled, queries), (k, padded), (v, padded))
    )
    ids = None
    if runs is not None:
        runs = jnp.pad(runs, ((0, 0), (0, padded - keys)), mode="edge")
        ids = splash.SegmentIds(q=runs[:, keys - length : keys - length + queries], kv=runs)
    kernel = _kernel(batch, heads, queries, padded, min(window, keys), keys - length, block, target.interpret)
    o = _attend(kernel, q, k, values, ids)
    return o.swapaxes(1, 2)[:, :length].astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel, q, k, v, ids):
    """The kernel. Its own rules do not report that it has no second derivative."""
    with _precision(q):
        return kernel(q, k, v, ids)


def _attend_forward(kernel, q, k, v, ids):
    with _precision(q):
        return jax.vjp(lambda q, k, v: kernel(q, k, v, ids), *derivatives.once((q, k, v)))


def _attend_backward(kernel, pullback, d_o):
    with _precision(d_o):
        return *pullback(derivatives.once(d_o)), None


def _precision(x: jax.Array):
    """The kernel's products ask for no precision, so a TPU would cut float32 to bfloat16, or use what the user asked for,
    which Mosaic refuses for products of bfloat16."""
    return jax.default_matmul_precision("highest" if x.dtype == jnp.float32 else "default")


_attend.defvjp(_attend_forward, _attend_backward)


@functools.lru_cache(maxsize=64)
def _kernel(batch: int, heads: int, queries: int, keys: int, window: int, offset: int, block: int, interpret):
    at_once = min(block, blocks.TPU_KEYS)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=at_once,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=at_once,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = _Window((queries, keys), window, offset)
    with jax.ensure_compile_time_eval():  # it is cached, so it must not belong to the program being traced
        kernel = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret
        )
    # The kernel's grid also has steps for blocks that are skipped.
    return flop_annotations.jit(jax.vmap(kernel), runs=batch * heads * mask.visited(block))


class _Window(masks.LocalMask):
    """JAX's mask of a window, which examines all pairs of tokens. Here the corners of a block tell whether all its queries
    see all its keys, or none sees any."""

    def __init__(self, shape: tuple[int, int], window: int, offset: int):
        super().__init__(shape, (window - 1, 0), offset)

    def __getitem__(self, index) -> np.ndarray:
        rows, columns = (range(size)[part] for size, part in zip(self.shape, index, strict=True))
        least, most = self._back(rows[0], columns[-1]), self._back(rows[-1], columns[0])
        seen = 0, self.window_size[0]
        if least >= seen[0] and most <= seen[1]:
            return np.ones((1, 1), np.bool_)
        if most < seen[0] or least > seen[1]:
            return np.zeros((1, 1), np.bool_)
        return super().__getitem__(index)

    def visited(self, block: int) -> int:
        """The number of blocks of queries and keys in which some query sees some key."""
        queries, keys = (np.arange(0, size, block) for size in self.shape)
        least, most = self._back(queries[:, None], keys + block - 1), self._back(queries[:, None] + block - 1, keys)
        return int(np.sum((most >= 0) & (least <= self.window_size[0])))

    def _back(self, query, key):
        """How far back a key lies."""
        return query + self.offset - key
