"""Full causal softmax attention with rotary positions: the transformer that linear layers are measured against (Vaswani et
al. 2017, arXiv:1706.03762; RoFormer, arXiv:2104.09864; grouped queries, arXiv:2305.13245).

Positions turn ``model.rotary_fraction`` of a head: all of it in the presets, half by default, as in Griffin."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.cached_attention import CachedAttention, mean_context
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.mixer import State
from jaxlinear.ops import segments
from jaxlinear.parallel import operations


class Attention(CachedAttention):
    """A token sees its document up to and including itself.

    A run from an empty past may be of any length. The state has room for ``context`` tokens of a document: from the next
    token on, whatever is computed from a state is NaN, since the beginning of the document has been forgotten. The layers
    above spread the NaN over all of the row's tokens of that call.
    """

    READS = (*CachedAttention.READS, "context")

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config, slots=config.context, rngs=rngs)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, past: operations.Past | None
    ) -> jax.Array:
        return operations.causal_attention(q, k, v, segment_ids=segment_ids, past=past)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        y, new = super().__call__(x, segment_ids=segment_ids, state=state)
        if state is not None:
            beyond = state["seen"][:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None] >= self.slots
            beyond &= (state["seen"] > 0)[:, None]  # with an empty past, nothing has been forgotten
            if segment_ids is not None:
                beyond &= segments.runs(segment_ids) == 0  # later documents have their whole past in this call
            y = jnp.where(beyond[..., None], jnp.full((), jnp.nan, y.dtype), y)
        return y, new

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """``flops_of_tokens``."""
        return cls.flops_of_tokens(config, mean_context(length, length))
