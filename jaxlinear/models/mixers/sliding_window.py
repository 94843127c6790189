"""Griffin's local block: sliding-window multi-query attention with rotary positions (arXiv:2402.19427, section 2.3)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxlinear import ops
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, fan_in_normal, rotary
from jaxlinear.ops import dtypes, segments
from jaxlinear.parallel import sharding


class SlidingWindow(nnx.Module):
    """H query heads, one key and value head.

    State: the ``keys`` (turned) and ``values`` ``[B, window, 1, K]`` of the last tokens, the one at position p in slot
    ``p % window``; ``position [B]``, that of the next token; and ``seen [B]``, the tokens before it in its document.
    Only differences of positions matter within a document, so a document may begin at any position.
    """

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        width = config.width
        self.heads, self.head_width, self.window = config.num_heads, config.head_width, config.window
        self.rotary_fraction = config.rotary_fraction
        self.dtype = config.activation_dtype
        inner = self.heads * self.head_width
        self.query = Linear(width, inner, axes=("embed", "heads"), bias=False, rngs=rngs)
        self.key = Linear(width, self.head_width, axes=("embed", None), bias=False, rngs=rngs)
        self.value = Linear(width, self.head_width, axes=("embed", None), bias=False, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(inner, width, axes=("heads", "embed"), bias=config.bias, init=init, rngs=rngs)

    def init_state(self, batch: int) -> dict[str, jax.Array]:
        past = jnp.zeros((batch, self.window, 1, self.head_width), self.dtype)
        none = jnp.zeros((batch,), jnp.int32)
        return {"keys": past, "values": past, "position": none, "seen": none}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch, length, _ = x.shape
        start = jnp.zeros((1,), jnp.int32) if state is None else state["position"]
        positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]

        q = self.query(x).reshape(batch, length, self.heads, self.head_width)
        q = sharding.constrain(q, "batch", "time", "heads", None)
        q = rotary(q, positions, fraction=self.rotary_fraction)
        k = rotary(self.key(x)[:, :, None], positions, fraction=self.rotary_fraction)
        v = self.value(x)[:, :, None]

        if state is not None and length == 1:
            o, state = self._one_token(q, k, v, state)
        else:
            o, state = self._tokens(q, k, v, segment_ids, state)
        return self.out(o.reshape(batch, length, -1)), state

    def _tokens(self, q, k, v, segment_ids, state):
        batch, length = q.shape[:2]
        ids, runs = segment_ids, None if segment_ids is None else segments.runs(segment_ids)
        start = seen = jnp.zeros((batch,), jnp.int32)
        if state is not None:
            # The past that is there is of the first token's document; what lies before that document is of none.
            start, seen, past = state["position"], state["seen"], self.window - 1
            slots = (start[:, None] - past + jnp.arange(past, dtype=jnp.int32)[None]) % self.window
            k = jnp.concatenate([_rows(state["keys"], slots), k], axis=1)
            v = jnp.concatenate([_rows(state["values"], slots), v], axis=1)
            empty = jnp.arange(past)[None] < past - seen[:, None]
            ids = jnp.ones((batch, length), jnp.int32) if runs is None else runs + 1
            ids = jnp.concatenate([jnp.where(empty, 0, 1), ids], axis=1)
        o = ops.sliding_window_attention(q, k, v, window=self.window, segment_ids=ids)

        # Slot s takes the last position that is congruent to it; it is not read if that lies before the document.
        last = start[:, None] + length - 1
        age = (last - jnp.arange(self.window, dtype=jnp.int32)[None]) % self.window
        places = jnp.maximum(k.shape[1] - 1 - age, 0)
        seen = seen + length
        if runs is not None:
            seen = jnp.where(runs[:, -1] == 0, seen, jnp.sum(runs == runs[:, -1:], axis=1, dtype=jnp.int32))
        return o, {"keys": _rows(k, places), "values": _rows(v, places), "position": start + length, "seen": seen}

    def _one_token(self, q, k, v, state):
        """The same for one token: its key and value go to their slot, and the slots are attended to as they lie."""
        position, seen = state["position"], state["seen"]
        slot = position % self.window
        keys, values = (_write(state[name], x, slot) for name, x in (("keys", k), ("values", v)))
        age = (slot[:, None] - jnp.arange(self.window, dtype=jnp.int32)[None]) % self.window
        wide = dtypes.wide(q.dtype)
        q = q[:, 0] * self.head_width**-0.5
        logits = jnp.einsum("bhk,bsk->bhs", q, keys[:, :, 0], preferred_element_type=wide)
        weights = jax.nn.softmax(jnp.where((age <= seen[:, None])[:, None], logits, -jnp.inf), axis=-1)
        o = jnp.einsum("bhs,bsk->bhk", weights.astype(v.dtype), values[:, :, 0], preferred_element_type=wide)
        state = {"keys": keys, "values": values, "position": position + 1, "seen": seen + 1}
        return o.astype(v.dtype), state


def _rows(x: jax.Array, places: jax.Array) -> jax.Array:
    """``x[b, places[b, i]]``: ``[B, N, 1, K]`` and ``[B, M]`` -> ``[B, M, 1, K]``."""
    return jnp.take_along_axis(x, places[:, :, None, None], axis=1)


def _write(x: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """``x`` ``[B, N, 1, K]`` with ``new`` ``[B, 1, 1, K]`` at ``slot`` ``[B]``."""
    return jax.vmap(lambda row, token, at: lax.dynamic_update_slice_in_dim(row, token, at, axis=0))(x, new, slot)
