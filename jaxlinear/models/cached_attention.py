"""Softmax attention with rotary positions, whose state is the keys and values of the last tokens: what ``sliding_window``
and ``attention`` share. They decide how far back a token sees."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import by_head
from jaxlinear.models.layers import Linear, fan_in_normal
from jaxlinear.models.mixer import Mixer, State
from jaxlinear.ops import rotary
from jaxlinear.ops.attention import decoding
from jaxlinear.parallel import operations, sharding


class CachedAttention(Mixer):
    """H query heads and G key and value heads, each shared by H / G query heads.

    State: the ``keys`` (turned) and ``values`` ``[B, G, slots, K]`` of the last tokens, with position p in slot
    ``p % slots``; ``position [B]``, that of the next token; and ``seen [B]``, the number of tokens before it in its
    document. G precedes the slots because the products of decoding read them in that order: otherwise everything would be
    transposed for every token. Only differences of positions matter within a document, so a document may begin at any
    position.
    """

    READS: ClassVar[tuple[str, ...]] = (
        "num_heads",
        "bias",
        "key_value_heads",
        "rotary_fraction",
        "rotary_base",
        "rotary_scaling",
        "rotary_context",
    )
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

    @classmethod
    def rotary_width(cls, config: ModelConfig) -> int:
        return config.head_width

    @staticmethod
    def flops_of_tokens(config: ModelConfig, seen: float) -> float:
        """Queries and outputs D x D, keys and values D x G K, and the products with the ``seen`` tokens."""
        d, h, k = config.width, config.num_heads, config.head_width
        return 2 * 2 * d * h * k + 2 * 2 * d * config.key_value_heads * k + 2 * 2 * h * k * seen

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
        turns = rotary.frequencies_of(
            self.head_width,
            fraction=self.rotary_fraction,
            base=self.rotary_base,
            scaling=self.rotary_scaling,
            context=self.rotary_context,
        )
        return rotary.turn(x, positions, turns)

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
        position, seen = state["position"], state["seen"]
        given = (state["keys"], state["values"]), (k, v), position % self.slots
        keys, values = decoding.write_slots(*given, on_one_device=sharding.parts("batch") == 1)
        o = decoding.attend_to_slots(q, keys, values, position, seen)
        return o, {"keys": keys, "values": values, "position": position + 1, "seen": seen + 1}


def _rows(x: jax.Array, places: jax.Array) -> jax.Array:
    """``x[b, places[b, i]]``: ``[B, N, G, K]`` and ``[B, M]`` -> ``[B, M, G, K]``."""
    return jnp.take_along_axis(x, places[:, :, None, None], axis=1)


def mean_context(length: int, window: int) -> float:
    """The number of tokens that a query sees, averaged over ``length`` positions: min(t, window) for t = 1 .. length."""
    window = min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
