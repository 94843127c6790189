"""Causal attention with time spread over devices: the keys and values of the shards travel round them in a ring.

Each shard keeps its queries. A block of keys and values goes from shard to shard in W - 1 steps of ``ppermute``, while
the shard that has it accumulates its contribution (Ring Attention, Liu et al. 2023, arXiv:2310.01889). In the backward
pass the block goes round again, its gradients follow one step later, and one more step brings them home. So memory
holds the keys and values of two shards and, in the backward pass, their gradients and what the present shard adds to
them; nothing anywhere has the size of T. Everything travels while a block is being worked on.

Blocks in a shard's future are skipped. That does not balance the load: shard r has r + 1 blocks to process, the last
one all W of them, and the others wait for it in the same steps; about half of the devices' time is idle, just as when
the keys are gathered. Balance needs a different order of tokens (striped, arXiv:2311.09431), which recurrences in the
same model do not have.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear.ops import segments
from jaxlinear.ops.attention import blockwise
from jaxlinear.ops.attention import op as attention
from jaxlinear.ops.attention.blockwise import Rule
from jaxlinear.parallel.exchanges import AXIS


class Block(NamedTuple):
    """Keys and values as they travel, padded to whole runs."""

    k: jax.Array  # [B, G, S, K]
    v: jax.Array  # [B, G, S, V]
    end: "End | None"


class End(NamedTuple):
    """The document of a block's last token, from which a later shard knows what it sees of the block."""

    id: jax.Array  # [B]
    begin: jax.Array  # [B] int32, its first token in the block


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    past: tuple[jax.Array, jax.Array, jax.Array] | None,
    scale: float | None,
) -> jax.Array:
    """Runs within ``shard_map``: a shard's queries ``[B, T/W, H, K]``, keys ``[B, T/W, G, K]``, values
    ``[B, T/W, G, V]`` and segment ids ``[B, T/W]``, and the ``operations.Past`` of the whole sequence ->
    ``[B, T/W, H, V]``. Sums are float32 at least."""
    attention.check_shapes("causal_attention", q, k, v)
    heads, groups, (batch, length), dtype = q.shape[2], k.shape[2], k.shape[:2], v.dtype
    if past is None:
        q, k, v = attention.promoted(q, k, v)
    else:
        q, k, v, past_keys, past_values = attention.promoted(q, k, v, *past[:2])
        past = past_keys, past_values, past[2]
    if past is not None and segment_ids is None:
        segment_ids = jnp.zeros_like(past[2], shape=(batch, length))
    block, scale = min(attention.QUERY_BLOCK, length), attention.scale_of(q, scale)
    own, keys = _block(k, v, segment_ids), 0 if past is None else past[0].shape[1]
    earlier = _block(*past) if past is not None and keys else None
    places = None if segment_ids is None else (segments.first_positions(segment_ids), segment_ids[:, 0])
    o = _attend(blockwise.by_blocks(q, groups, block), own, earlier, places, _Shape(length, keys, block, scale))
    return blockwise.from_blocks(o, length, heads, block).astype(dtype)


class _Shape(NamedTuple):
    length: int  # tokens of a shard
    past: int  # tokens before the first shard
    block: int  # queries in a block
    scale: float

    def rule(self, keys: int) -> Rule:
        return Rule(self.scale, min(attention.KEY_RUN, keys), True)


def _block(k, v, ids) -> Block:
    pad = -k.shape[1] % min(attention.KEY_RUN, k.shape[1])
    k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (k, v))
    return Block(k, v, None if ids is None else End(ids[:, -1], segments.first_positions(ids)[:, -1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, own: Block, earlier: Block | None, places: Any, shape: _Shape) -> jax.Array:
    """``places``: where in the shard each token's document begins ``[B, T/W]``, and the first token's id ``[B]``."""
    return _forward(q, own, earlier, places, shape)[0]


def _forward(q, own, earlier, places, shape):
    def visit(sums, block, meetings, rule):
        return blockwise.see(sums, q, block.k, block.v, meetings, rule), None

    sums, _, _ = _round(visit, blockwise.nothing_seen(q, own.v), None, own, earlier, places, shape)
    outputs = checkpoint_name(blockwise.normalised(sums, own.v), "attention")
    return outputs[0], (q, own, earlier, places, outputs)


def _backward(shape, residuals, do):
    q, own, earlier, places, outputs = residuals

    def none(block):
        return tuple(blockwise.no_gradient(x, turned=True) for x in (block.k, block.v))

    def visit(dq, block, meetings, rule):
        dq, dk, dv = blockwise.pull_back((dq, *none(block)), q, block.k, block.v, outputs, do, meetings, rule)
        return dq, (dk, dv)

    def of_block(gradients, block):
        if block is None:
            return None
        dk, dv = (dx.swapaxes(2, 3).astype(x.dtype) for dx, x in zip(gradients, (block.k, block.v), strict=True))
        return Block(dk, dv, None)

    dq, d_own, d_earlier = _round(visit, blockwise.no_gradient(q), none(own), own, earlier, places, shape)
    return dq.astype(q.dtype), of_block(d_own, own), of_block(d_earlier, earlier), None


_attend.defvjp(_forward, _backward)


def _round(visit, carry, gained, own: Block, earlier: Block | None, places, shape: _Shape):
    """Calls ``visit(carry, block, meetings, rule)`` for the own block, those before it, nearest first, and the past.

    A visit returns the carry and the block's gain. A block's gains start as ``gained``, follow it from shard to shard, and
    are home at the end.

    Returns:
      the carry, and the gains of the own block and of the past.
    """
    rank, shards = lax.axis_index(AXIS), lax.axis_size(AXIS)
    batch, size = own.k.shape[0], own.k.shape[2]
    blocks = range(-(-shape.length // shape.block))
    to_end = jnp.ones((batch,), bool)  # the shard's first document begins before the block visited last

    def met(keys: int, lowest, offset, last: int):
        run = shape.rule(keys).run
        pairs = [(i, start) for i in blocks for start in range(0, keys, run)]
        return blockwise.meetings(pairs, lowest, offset, last, shape.block), shape.rule(keys)

    def of_earlier_block(to_end, end: End | None, keys: int):
        """What the queries see of a block before the shard, and whether they may see more before that."""
        if places is None or end is None:
            return jnp.zeros((1, shape.length), jnp.int32), to_end
        first, id_ = places
        to_end = to_end & (end.id == id_)
        begin = jnp.where(to_end, end.begin, jnp.int32(keys))
        lowest = jnp.where(first == 0, begin[:, None], jnp.int32(keys))
        return lowest, to_end & (end.begin == 0)

    def meet(s, carry, to_end, gained, block):
        arrived = _onward(gained)  # the gains of this block, from the shard before
        lowest, further = of_earlier_block(to_end, block.end, size)
        is_own = s == 0
        if places is not None:
            lowest = jnp.where(is_own, places[0], lowest)
        # For a block in the future, every meeting is after the last query.
        offset = jnp.where(s <= rank, s * shape.length, jnp.int32(-len(blocks) * shape.block))
        carry, more = visit(carry, block, *met(size, lowest, offset, shape.length - 1))
        return carry, jnp.where(is_own | (s > rank), to_end, further), jax.tree.map(jnp.add, arrived, more)

    def step(s, loop):
        carry, to_end, gained, block = loop
        following = _onward(block)
        return *meet(jnp.asarray(s, jnp.int32), carry, to_end, gained, block), following

    carry, to_end, gained, block = lax.fori_loop(0, shards - 1, step, (carry, to_end, gained, own))
    carry, to_end, gained = meet(jnp.int32(shards - 1), carry, to_end, gained, block)
    of_earlier = None
    if earlier is not None:
        keys = earlier.k.shape[2]
        lowest, _ = of_earlier_block(to_end, earlier.end, keys)
        carry, of_earlier = visit(carry, earlier, *met(keys, lowest, keys, shape.past - 1))
    return carry, _onward(gained), of_earlier


def _onward(tree):
    """Sends a tree to the next shard, and from the last to the first."""
    shards = lax.axis_size(AXIS)
    pairs = [(i, (i + 1) % shards) for i in range(shards)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, pairs), tree)
