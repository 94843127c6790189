"""Griffin's local block: sliding-window multi-query attention with rotary positions (arXiv:2402.19427, section 2.3)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear import ops
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, fan_in_normal, rotary
from jaxlinear.ops import segments
from jaxlinear.parallel import sharding


class SlidingWindow(nnx.Module):
    """H query heads, one key and value head. State: the last window-1 ``keys`` (turned) and ``values``
    ``[B, window-1, 1, K]``, and ``position [B]``, the tokens seen in the present document."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.heads, self.head_width, self.window = config.num_heads, config.head_width, config.window
        self.rotary_fraction = config.rotary_fraction
        self.dtype = config.activation_dtype
        inner = self.heads * self.head_width
        self.query = Linear(width, inner, axes=("embed", "heads"), bias=False, rngs=rngs)
        self.key = Linear(width, self.head_width, axes=("embed", None), bias=False, rngs=rngs)
        self.value = Linear(width, self.head_width, axes=("embed", None), bias=False, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(inner, width, axes=("heads", "embed"), init=init, rngs=rngs)

    def init_state(self, batch: int) -> dict[str, jax.Array]:
        past = jnp.zeros((batch, self.window - 1, 1, self.head_width), self.dtype)
        return {"keys": past, "values": past, "position": jnp.zeros((batch,), jnp.int32)}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch, length, _ = x.shape
        # Only differences of positions matter within a document, so a document may begin at any position.
        start = jnp.zeros((1,), jnp.int32) if state is None else state["position"]
        positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]

        q = self.query(x).reshape(batch, length, self.heads, self.head_width)
        q = sharding.constrain(q, "batch", "time", "heads", None)
        q = rotary(q, positions, fraction=self.rotary_fraction)
        k = rotary(self.key(x)[:, :, None], positions, fraction=self.rotary_fraction)
        v = self.value(x)[:, :, None]

        ids = segment_ids
        if state is not None:
            # The past that is there is of the first token's document; what lies before that document is of none.
            past = self.window - 1
            ids = jnp.ones((batch, length), jnp.int32) if ids is None else segments.runs(ids) + 1
            empty = jnp.arange(past)[None] < past - state["position"][:, None]
            ids = jnp.concatenate([jnp.where(empty, 0, 1), ids], axis=1)
            k = jnp.concatenate([state["keys"], k], axis=1)
            v = jnp.concatenate([state["values"], v], axis=1)
        o = ops.sliding_window_attention(q, k, v, window=self.window, segment_ids=ids)
        y = self.out(o.reshape(batch, length, -1))
        return y, self._next_state(k, v, segment_ids, start, length)

    def _next_state(self, k, v, segment_ids, start, length):
        batch, past = k.shape[0], self.window - 1
        missing = max(past - k.shape[1], 0)
        keys, values = (jnp.pad(y, ((0, 0), (missing, 0), (0, 0), (0, 0)))[:, -past:] for y in (k, v))
        seen = jnp.broadcast_to(start + length, (batch,))
        if segment_ids is not None:
            runs = segments.runs(segment_ids)
            seen = jnp.where(runs[:, -1] == 0, seen, jnp.sum(runs == runs[:, -1:], axis=1, dtype=jnp.int32))
        return {"keys": keys, "values": values, "position": seen}
