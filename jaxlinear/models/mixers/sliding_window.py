"""Griffin's local block: sliding-window attention with rotary positions (arXiv:2402.19427, section 2.3). With one key and
value head it is multi-query, as in the paper; with more, grouped."""

import jax
from flax import nnx

from jaxlinear.models.cached_attention import CachedAttention, mean_context
from jaxlinear.models.config import ModelConfig
from jaxlinear.parallel import operations


class SlidingWindow(CachedAttention):
    """A token sees the last ``window`` tokens of its document, including itself; the state holds these."""

    READS = (*CachedAttention.READS, "window")

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config, slots=config.window, rngs=rngs)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, past: operations.Past | None
    ) -> jax.Array:
        return operations.sliding_window_attention(q, k, v, window=self.slots, segment_ids=segment_ids, past=past)

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """As full attention, but a token sees only the window."""
        return cls.flops_of_tokens(config, mean_context(length, config.window))
