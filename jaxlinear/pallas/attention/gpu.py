"""Causal softmax attention for GPU, full or windowed, through Triton: cuDNN does not combine a window with documents.

One kernel for the outputs, one for the gradients of queries and one for those of keys and values, each a loop over the
blocks that some token of its own block sees or is seen by (FlashAttention-2, Dao 2023, arXiv:2307.08691). Weights are
powers of two, of logits that are scaled by log2(e).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.attention import blocks
from jaxlinear.pallas.attention.tpu import SAVED
from jaxlinear.pallas.parts import derivatives, products
from jaxlinear.pallas.parts.gpu_layout import power_of_two
from jaxlinear.pallas.parts.target import Target

_MASKED = -1e30  # finite, so that a row's maximum minus itself is 0 and not NaN


class _Rule(NamedTuple):
    """What is fixed at trace time."""

    scale: float  # of the logits
    window: int
    prefix: int  # keys before that of query 0
    block: blocks.GPUBlock
    interpret: Any


class _Seen(NamedTuple):
    """Query t sees the keys ``lowest[t] .. prefix + t``."""

    lowest: jax.Array  # [B, T] int32, does not decrease
    last: jax.Array  # [B, S] int32: the last query that sees the key or one before it, -1 if there is none


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, runs: jax.Array | None, *, window: int, scale: float, target: Target
) -> jax.Array:
    """As ``jaxlinear.pallas.attention.kernel.attention``."""
    batch, length, _, key_width = q.shape
    keys, value_width = v.shape[1], v.shape[3]
    widths = power_of_two(key_width), power_of_two(value_width)
    block = blocks.gpu(max(widths), target.gpu)
    whole = math.lcm(block.queries, block.keys)
    # Whole blocks of both, and for every query its own key. Padding is seen only by queries after the end.
    queries = -(-length // whole) * whole
    padded = -(-(keys - length + queries) // whole) * whole
    seen = _seen(runs, batch, length, keys, window)
    dtype = functools.reduce(np.promote_types, (q.dtype, k.dtype, v.dtype))
    q, k, values = (
        jnp.pad(x.astype(dtype), ((0, 0), (0, size - x.shape[1]), (0, 0), (0, width - x.shape[3])))
        for x, size, width in ((q, queries, widths[0]), (k, padded, widths[0]), (v, padded, widths[1]))
    )
    seen = _Seen(
        *(
            jnp.pad(x, ((0, 0), (0, size - x.shape[1])), mode="edge")
            for x, size in ((seen.lowest, queries), (seen.last, padded))
        )
    )
    o = _attend(q, k, values, seen, _Rule(scale, window, keys - length, block, target.interpret))
    return o[:, :length, :, :value_width].astype(v.dtype)


def _seen(runs: jax.Array | None, batch: int, length: int, keys: int, window: int) -> _Seen:
    prefix, key = keys - length, jnp.arange(keys, dtype=jnp.int32)[None]
    first, end = jnp.zeros((batch, 1), jnp.int32), jnp.full((batch, 1), keys - 1, jnp.int32)
    if runs is not None:  # where the document of each key begins and ends
        other, edge = runs[:, 1:] != runs[:, :-1], jnp.ones((batch, 1), jnp.bool_)
        first = lax.cummax(jnp.where(jnp.concatenate([edge, other], 1), key, 0), axis=1)
        end = lax.cummin(jnp.where(jnp.concatenate([other, edge], 1), key, keys), axis=1, reverse=True)
    lowest = jnp.maximum(first, key - window + 1)[:, prefix:]
    last = jnp.minimum(end, key + window - 1) - prefix
    return _Seen(lowest, jnp.maximum(last, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: _Seen, rule: _Rule) -> jax.Array:
    """``q [B, T, H, K]``, ``k [B, S, G, K]``, ``v [B, S, G, V]``, whole blocks of powers of two -> ``o [B, T, H, V]``"""
    return _attend_forward(q, k, v, seen, rule)[0]


def _attend_forward(q, k, v, seen, rule):
    batch, length, heads, _ = q.shape
    o = jax.ShapeDtypeStruct((batch, length, heads, v.shape[3]), v.dtype)
    log_totals = jax.ShapeDtypeStruct((batch, heads, length), _wide(q))
    grid = length // rule.block.queries, heads, batch
    inputs = derivatives.once((q, k, v, seen.lowest))
    outputs = _call(_outputs_kernel, "outputs", rule, grid, inputs, (o, log_totals), (1, 1))
    outputs = tuple(checkpoint_name(x, SAVED) for x in outputs)
    return outputs[0], (q, k, v, seen, outputs)


def _attend_backward(rule, residuals, d_o):
    (q, k, v, seen, (o, log_totals)), d_o = derivatives.once((residuals, d_o))
    (batch, length, heads, _), (_, keys, groups, _), wide = q.shape, k.shape, _wide(q)
    # sum_v o do: the gradient through the softmax's normaliser (section 3.1.2)
    deltas = jnp.sum(o.astype(wide) * d_o.astype(wide), axis=-1).swapaxes(1, 2)
    inputs = q, k, v, seen.lowest, d_o, log_totals, deltas
    grid = length // rule.block.queries, heads, batch
    (d_q,) = _call(_queries_kernel, "queries", rule, grid, inputs, (q,), (2, 1))
    grid = keys // rule.block.keys, groups, batch
    d_k, d_v = _call(_keys_kernel, "keys", rule, grid, (*inputs, seen.last), (k, v), (2, 2))
    return d_q, d_k, d_v, None


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, name: str, rule: _Rule, grid, inputs, outputs, products: tuple[int, int]) -> list[jax.Array]:
    """``products``: how many products over K and over V a query takes with a key it meets."""
    q, _, v = inputs[:3]
    batch, length, heads, key_width = q.shape
    wide = products[0] * key_width + products[1] * v.shape[3]
    return pl.pallas_call(
        functools.partial(kernel, rule),
        grid=grid,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=rule.block.warps, num_stages=rule.block.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * heads * _pairs(rule, length) * wide,
            transcendentals=batch * heads * _pairs(rule, length),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*inputs, *outputs)),
        ),
        name=f"attention_{name}",
        interpret=rule.interpret,
    )(*inputs)


def _pairs(rule: _Rule, length: int) -> int:
    """The number of pairs of queries and keys that meet, by blocks, in a row of one document."""
    block, met = rule.block, 0
    for first in range(rule.prefix, rule.prefix + length, block.queries):
        lowest = max(first - rule.window + 1, 0)
        met += (first + block.queries - 1) // block.keys + 1 - lowest // block.keys
    return met * block.queries * block.keys


def _outputs_kernel(rule: _Rule, q_ref, k_ref, v_ref, lowest_ref, o_ref, log_totals_ref) -> None:
    """A block of queries of a head: ``o``, and the logs of the sums of weights."""
    i, h, b = (pl.program_id(axis) for axis in range(3))
    group, rows = _group(h, q_ref, k_ref), pl.ds(i * rule.block.queries, rule.block.queries)
    q, lowest = plgpu.load(q_ref.at[b, rows, h]), plgpu.load(lowest_ref.at[b, rows])

    def meet(n, sums):
        peak, total, weighted = sums
        columns = pl.ds(n * rule.block.keys, rule.block.keys)
        k, v = plgpu.load(k_ref.at[b, columns, group]), plgpu.load(v_ref.at[b, columns, group])
        logits = jnp.where(_sees(rule, i, n, lowest), _logits(rule, q, k), _MASKED)
        highest = jnp.maximum(peak, jnp.max(logits, axis=1))
        # What a row summed before its first visible key is multiplied by exp2(_MASKED - highest) = 0 from then on.
        fade, weights = jnp.exp2(peak - highest), jnp.exp2(logits - highest[:, None])
        total = fade * total + jnp.sum(weights, axis=1)
        return highest, total, fade[:, None] * weighted + _dot(weights.astype(v.dtype), v, (1, 0))

    wide = _wide(q)
    nothing = jnp.zeros((rule.block.queries,), wide)
    sums = nothing + _MASKED, nothing, jnp.zeros((rule.block.queries, v_ref.shape[3]), wide)
    first, end = _keys_met(rule, i, b, lowest_ref)
    peak, total, weighted = lax.fori_loop(first, end, meet, sums)
    plgpu.store(o_ref.at[b, rows, h], (weighted / total[:, None]).astype(o_ref.dtype))
    plgpu.store(log_totals_ref.at[b, h, rows], peak + jnp.log2(total))


def _queries_kernel(rule: _Rule, q_ref, k_ref, v_ref, lowest_ref, d_o_ref, log_totals_ref, deltas_ref, d_q_ref) -> None:
    """A block of queries of a head: their gradients."""
    i, h, b = (pl.program_id(axis) for axis in range(3))
    group, rows = _group(h, q_ref, k_ref), pl.ds(i * rule.block.queries, rule.block.queries)
    q, d_o = plgpu.load(q_ref.at[b, rows, h]), plgpu.load(d_o_ref.at[b, rows, h])
    lowest, log_totals = plgpu.load(lowest_ref.at[b, rows]), plgpu.load(log_totals_ref.at[b, h, rows])
    deltas = plgpu.load(deltas_ref.at[b, h, rows])

    def meet(n, d_q):
        columns = pl.ds(n * rule.block.keys, rule.block.keys)
        k, v = plgpu.load(k_ref.at[b, columns, group]), plgpu.load(v_ref.at[b, columns, group])
        weights = _weights(rule, q, k, log_totals, _sees(rule, i, n, lowest))
        d_logits = weights * (_dot(d_o, v, (1, 1)) - deltas[:, None])
        return d_q + _dot(d_logits.astype(k.dtype), k, (1, 0))

    first, end = _keys_met(rule, i, b, lowest_ref)
    d_q = lax.fori_loop(first, end, meet, jnp.zeros(q.shape, _wide(q)))
    plgpu.store(d_q_ref.at[b, rows, h], (rule.scale * d_q).astype(d_q_ref.dtype))


def _keys_kernel(
    rule: _Rule, q_ref, k_ref, v_ref, lowest_ref, d_o_ref, log_totals_ref, deltas_ref, last_ref, d_k_ref, d_v_ref
) -> None:
    """A block of keys and values of a group: their gradients, from all heads that read it."""
    n, group, b = (pl.program_id(axis) for axis in range(3))
    block, heads = rule.block, q_ref.shape[2] // k_ref.shape[2]
    columns = pl.ds(n * block.keys, block.keys)
    k, v = plgpu.load(k_ref.at[b, columns, group]), plgpu.load(v_ref.at[b, columns, group])
    # Of all queries that see one of these keys, the first is at the first key, and the last is that of the last key.
    first = lax.div(jnp.maximum(n * block.keys - rule.prefix, 0), block.queries)
    end = lax.div(plgpu.load(last_ref.at[b, n * block.keys + block.keys - 1]) + block.queries, block.queries)

    def meet(step, gradients):
        d_k, d_v = gradients
        h, i = group * heads + lax.rem(step, heads), first + lax.div(step, heads)
        rows = pl.ds(i * block.queries, block.queries)
        q, d_o = plgpu.load(q_ref.at[b, rows, h]), plgpu.load(d_o_ref.at[b, rows, h])
        lowest, log_totals = plgpu.load(lowest_ref.at[b, rows]), plgpu.load(log_totals_ref.at[b, h, rows])
        weights = _weights(rule, q, k, log_totals, _sees(rule, i, n, lowest))
        d_v = d_v + _dot(weights.astype(v.dtype), d_o, (0, 0))
        d_logits = weights * (_dot(d_o, v, (1, 1)) - plgpu.load(deltas_ref.at[b, h, rows])[:, None])
        return d_k + _dot(d_logits.astype(q.dtype), q, (0, 0)), d_v

    nothing = jnp.zeros(k.shape, _wide(k)), jnp.zeros(v.shape, _wide(k))
    d_k, d_v = lax.fori_loop(jnp.int32(0), jnp.maximum(end - first, 0) * heads, meet, nothing)
    plgpu.store(d_k_ref.at[b, columns, group], (rule.scale * d_k).astype(d_k_ref.dtype))
    plgpu.store(d_v_ref.at[b, columns, group], d_v.astype(d_v_ref.dtype))


def _keys_met(rule: _Rule, i, b, lowest_ref):
    """The blocks of keys that a block of queries meets: the first, and the end (exclusive)."""
    block, first = rule.block, i * rule.block.queries
    lowest = plgpu.load(lowest_ref.at[b, first])
    return lax.div(lowest, block.keys), lax.div(rule.prefix + first + block.queries - 1, block.keys) + 1


def _sees(rule: _Rule, i, n, lowest):
    """Which queries of block i see which keys of block n, ``[t, s]``."""
    own = rule.prefix + i * rule.block.queries + jnp.arange(rule.block.queries, dtype=jnp.int32)
    key = n * rule.block.keys + jnp.arange(rule.block.keys, dtype=jnp.int32)
    return (key[None] >= lowest[:, None]) & (key[None] <= own[:, None])


def _logits(rule: _Rule, q, k):
    """``[t, s]``, times log2(e)."""
    return (rule.scale * math.log2(math.e)) * _dot(q, k, (1, 1))


def _weights(rule: _Rule, q, k, log_totals, sees):
    """``[t, s]``; those of a query sum to 1."""
    return jnp.where(sees, jnp.exp2(_logits(rule, q, k) - log_totals[:, None]), 0.0)


def _group(h, q_ref, k_ref):
    """The group that head h reads."""
    return lax.div(h, q_ref.shape[2] // k_ref.shape[2])


def _wide(x) -> np.dtype:
    return np.promote_types(x.dtype, np.float32)


def _dot(x, y, over: tuple[int, int]):
    """The product of two matrices over one axis of each, summed in at least float32."""
    return products.dot(x, y, over, _wide(x))
