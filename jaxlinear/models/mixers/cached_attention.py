"""Softmax attention with rotary positions, whose state is the keys and values of the last tokens: what ``sliding_window``
and ``attention`` share. They decide how far back a token sees."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import by_head
from jaxlinear.models.layers import Linear, fan_in_normal, rotary, rotary_frequencies
from jaxlinear.ops import backends, dtypes
from jaxlinear.parallel import operations, sharding

State = dict[str, jax.Array]

_ROWS = 8  # rows that make a product run on a TPU's matrix unit


class CachedAttention(nnx.Module):
    """H query heads and G key and value heads, each shared by H / G query heads.

    State: the ``keys`` (turned) and ``values`` ``[B, G, slots, K]`` of the last tokens, with position p in slot
    ``p % slots``; ``position [B]``, that of the next token; and ``seen [B]``, the number of tokens before it in its
    document. G precedes the slots because the products of decoding read them in that order: otherwise everything would be
    transposed for every token. Only differences of positions matter within a document, so a document may begin at any
    position.
    """

    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, slots: int, rngs: nnx.Rngs):
        width = config.width
        self.heads, self.groups, self.head_width = config.num_heads, config.key_value_heads, config.head_width
        self.slots = slots
        self.rotary_fraction, self.rotary_base = config.rotary_fraction, config.rotary_base
        self.rotary_scaling, self.rotary_context = config.rotary_scaling, config.rotary_context
        self.dtype = config.activation_dtype
        inner, shared = self.heads * self.head_width, self.groups * self.head_width
        # A single head is not split over the mesh: every device needs all of it.
        by_group = "heads" if self.groups > 1 else None
        self.query = Linear(width, inner, axes=("embed", "heads"), bias=False, rngs=rngs)
        self.key = Linear(width, shared, axes=("embed", by_group), bias=False, rngs=rngs)
        self.value = Linear(width, shared, axes=("embed", by_group), bias=False, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(inner, width, axes=("heads", "embed"), bias=config.bias, init=init, rngs=rngs)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, past: operations.Past | None
    ) -> jax.Array:
        """``q [B, T, H, K]``, ``k`` and ``v`` ``[B, T, G, K]``, ``segment_ids [B, T]`` -> ``[B, T, H, K]``."""
        raise NotImplementedError

    def init_state(self, batch: int) -> State:
        past, counts = (batch, self.groups, self.slots, self.head_width), (batch,)
        return {
            **{name: jnp.zeros(past, self.dtype) for name in ("keys", "values")},
            **{name: jnp.zeros(counts, jnp.int32) for name in ("position", "seen")},
        }

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        batch, length, _ = x.shape
        start = jnp.zeros((1,), jnp.int32) if state is None else state["position"]
        positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        q = self._turn(by_head(self.query(x), self.heads), positions)
        k = self._turn(by_head(self.key(x), self.groups), positions)
        v = by_head(self.value(x), self.groups)
        if state is not None and length == 1:
            o, state = self._one_token(q, k, v, state)
        else:
            o, state = self._tokens(q, k, v, segment_ids, state)
        return self.out(o.reshape(batch, length, -1)), state

    def _turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        turns = rotary_frequencies(
            self.head_width,
            fraction=self.rotary_fraction,
            base=self.rotary_base,
            scaling=self.rotary_scaling,
            context=self.rotary_context,
        )
        return rotary(x, positions, turns)

    def _tokens(self, q, k, v, segment_ids, state):
        batch, length = q.shape[:2]
        start = seen = jnp.zeros((batch,), jnp.int32)
        past, all_k, all_v = None, k, v
        if state is not None:
            # The past belongs to the first token's document; slots from before that document belong to none.
            start, seen, count = state["position"], state["seen"], self.slots - 1
            slots = (start[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None]) % self.slots
            keys, values = (_rows(state[name].swapaxes(1, 2), slots) for name in ("keys", "values"))
            empty = jnp.arange(count, dtype=jnp.int32)[None] < count - seen[:, None]
            first = jnp.zeros((1, 1), jnp.int32) if segment_ids is None else segment_ids[:, :1].astype(jnp.int32)
            ids = jnp.where(empty, operations.NO_DOCUMENT, first)
            past = self._for_each_device(keys), self._for_each_device(values), ids
            all_k, all_v = jnp.concatenate([keys, k], axis=1), jnp.concatenate([values, v], axis=1)
        o = self.attend(q, self._for_each_device(k), self._for_each_device(v), segment_ids, past)

        # Slot s takes the last position congruent to it; it is not read if that position precedes the document.
        last = start[:, None] + length - 1
        age = (last - jnp.arange(self.slots, dtype=jnp.int32)[None]) % self.slots
        places = jnp.maximum(all_k.shape[1] - 1 - age, 0)
        seen = seen + length
        if segment_ids is not None:
            begins = operations.document_starts(segment_ids)
            last_begin = jnp.max(jnp.where(begins, jnp.arange(length, dtype=jnp.int32)[None], 0), axis=1)
            seen = jnp.where(last_begin == 0, seen, length - last_begin)
        keys, values = (_rows(x, places).swapaxes(1, 2) for x in (all_k, all_v))
        return o, {"keys": keys, "values": values, "position": start + length, "seen": seen}

    def _for_each_device(self, x: jax.Array) -> jax.Array:
        """Keys or values. If they have fewer heads than there are devices that share the query heads, they are repeated
        until each device has its own. Their gradients are then summed over devices once, not in every block."""
        copies, rest = divmod(sharding.parts("heads"), self.groups)
        if copies <= 1 or rest or self.heads % (copies * self.groups):
            return x
        return sharding.constrain(jnp.repeat(x, copies, axis=2), "batch", "time", "heads", None)

    def _one_token(self, q, k, v, state):
        """The same for one token: its key and value go to their slot, and the slots are attended to in stored order."""
        batch, position, seen = q.shape[0], state["position"], state["seen"]
        slot = position % self.slots
        keys, values = _write((state["keys"], state["values"]), (k, v), slot)
        age = (slot[:, None] - jnp.arange(self.slots, dtype=jnp.int32)[None]) % self.slots
        q = q.reshape(batch, self.groups, -1, self.head_width) * self.head_width**-0.5
        sharing = q.shape[2]
        if sharing == 1 and backends.platform() == "tpu":
            # There, products with a single row run element by element, which takes longer than reading the slots.
            q = jnp.pad(q, ((0, 0), (0, 0), (0, _ROWS - 1), (0, 0)))
        logits = dtypes.product("bgrk,bgsk->bgrs", q, keys)
        weights = jax.nn.softmax(jnp.where((age <= seen[:, None])[:, None, None], logits, -jnp.inf), axis=-1)
        o = dtypes.product("bgrs,bgsk->bgrk", weights.astype(v.dtype), values)[:, :, :sharing]
        state = {"keys": keys, "values": values, "position": position + 1, "seen": seen + 1}
        return o.astype(v.dtype), state


def _rows(x: jax.Array, places: jax.Array) -> jax.Array:
    """``x[b, places[b, i]]``: ``[B, N, G, K]`` and ``[B, M]`` -> ``[B, M, G, K]``."""
    return jnp.take_along_axis(x, places[:, :, None, None], axis=1)


def _write(past: tuple[jax.Array, ...], new: tuple[jax.Array, ...], slot: jax.Array) -> tuple[jax.Array, ...]:
    """Each ``[B, G, N, K]`` of the past, with the new ``[B, 1, G, K]`` written at ``slot`` ``[B]``."""
    new = tuple(x.swapaxes(1, 2) for x in new)
    write = functools.partial(lax.dynamic_update_slice_in_dim, axis=1)

    def row_by_row(past):
        return tuple(jax.vmap(write)(x, token, slot) for x, token in zip(past, new, strict=True))

    if backends.platform() != "tpu" or sharding.parts("batch") > 1:
        return row_by_row(past)

    def at_once(past):
        return tuple(
            lax.dynamic_update_slice_in_dim(x, token, slot[0], axis=2) for x, token in zip(past, new, strict=True)
        )

    # Row by row, it is a loop over the rows there. Rows that began together, like those of ``generate``, share one slot.
    return lax.cond(jnp.all(slot == slot[:1]), at_once, row_by_row, past)
