"""The language model: embeddings, the pattern of blocks scanned over its period, a last norm, tied logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.models import mixers
from jaxlinear.models.across_layers import across_layers
from jaxlinear.models.blocks import Losses, Period, add
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, RMSNorm, by_outputs, parameter
from jaxlinear.models.mixers.cached_attention import CachedAttention
from jaxlinear.ops import dtypes
from jaxlinear.ops.cross_entropy import soft_capped
from jaxlinear.parallel import sharding
from jaxlinear.parallel.exchanges import EXCHANGED

_NO_SEGMENT = -1  # of a state that no token has been before

# How much of a period the backward pass computes again instead of finding it stored. Elementwise work is cheaper to
# repeat than to write and read back.
REMAT_POLICIES = {
    "none": None,
    "elementwise": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names(*ops.SAVED, "experts", EXCHANGED),
    ),
    "products": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(EXCHANGED),
    ),
    "full": jax.checkpoint_policies.save_only_these_names(EXCHANGED),
}


class LanguageModel(nnx.Module):
    """``model(tokens [B, T] int32, segment_ids=None, state=None) -> (logits [B, T, vocab] float32, state)``.

    The whole periods of the pattern are one module with stacked parameters, scanned, so that neither the program nor
    the time to compile it grows with depth; what is left of the depth (26 = 8 * 3 + 2) is a shorter period after them.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.by_output = False  # the layout of linear maps, see `for_decoding`
        periods, rest = divmod(config.num_layers, len(config.pattern))
        init = nnx.initializers.normal(config.width**-0.5)
        self.embedding = parameter(init, (config.vocab_size, config.width), ("vocab", "embed"), rngs)

        @nnx.split_rngs(splits=max(periods, 1))
        @nnx.vmap(in_axes=(0, 0), out_axes=0)
        def stack(rngs: nnx.Rngs, first_layer: jax.Array) -> Period:
            return Period(config, config.pattern, first_layer=first_layer, rngs=rngs)

        first_layers = jnp.arange(periods, dtype=jnp.int32) * len(config.pattern)
        self.periods: Any = stack(rngs, first_layers) if periods else None
        self.rest = (
            Period(config, config.pattern[:rest], first_layer=config.num_layers - rest, rngs=rngs) if rest else None
        )
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        self.head = (
            None
            if config.tied_embeddings
            else parameter(init, (config.vocab_size, config.width), ("vocab", "embed"), rngs)
        )

    @property
    def num_periods(self) -> int:
        return self.config.num_layers // len(self.config.pattern)

    @property
    def is_stacked(self) -> bool:
        """Whether the periods are one module with stacked parameters, and their states stacked likewise."""
        return not isinstance(self.periods, nnx.List)

    def unstacked(self) -> "LanguageModel":
        """The same model with parameters and state of each period in arrays of their own.

        It is for decoding: a scan copies the parameters and the state of a period out of the stacks for every token.
        The program and the time to compile it then grow with depth.
        """
        if self.periods is None or not self.is_stacked:
            return self
        graph, stacked = nnx.split(self.periods)
        model = nnx.clone(self)
        model.periods = nnx.List(
            [nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(self.num_periods)]
        )
        return model

    def for_decoding(self) -> "LanguageModel":
        """``unstacked``, and on one CPU with the kernels of linear maps laid out for products with few tokens."""
        model = self.unstacked()
        first, *others = jnp.asarray(self.embedding[...]).devices()
        if model.by_output or others or first.platform != "cpu":
            return model
        model = nnx.clone(model)
        model.by_output = True
        for _, module in nnx.iter_graph(model):
            if isinstance(module, Linear):
                module.turn()
        return model

    def remember(self, tokens: int) -> None:
        """Gives the states of attention room for no more than ``tokens``, of this very model. Where rows get no longer,
        that changes nothing but what a token reads."""
        for _, module in nnx.iter_graph(self):
            if isinstance(module, CachedAttention):
                module.slots = min(module.slots, tokens)

    def init_state(self, batch: int) -> dict[str, Any]:
        """The empty past of ``batch`` rows."""
        state: dict[str, Any] = {"segment": jnp.full((batch,), _NO_SEGMENT, jnp.int32)}
        if not self.is_stacked:
            state["periods"] = [period.init_state(batch) for period in self.periods]
        elif self.periods is not None:
            one = self.periods.init_state(batch)
            state["periods"] = jax.tree.map(lambda x: jnp.repeat(x[None], self.num_periods, axis=0), one)
        if self.rest is not None:
            state["rest"] = self.rest.init_state(batch)
        return state

    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, state: dict[str, Any] | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits for the token after each token, and the state after the last.

        ``segment_ids`` ``[B, T]``: documents do not see each other. A state that is handed on continues the document
        it ended in; a row whose next segment id is another one starts from an empty past.
        """
        x, state, _ = self.hidden(tokens, segment_ids, state)
        return self.logits(x), state

    @property
    def output_embedding(self) -> jax.Array:
        """``[vocab, D]``, what turns the last hidden values into logits."""
        return (self.embedding if self.head is None else self.head)[...]

    def logits(self, x: jax.Array) -> jax.Array:
        """``[B, T, vocab]`` float32 from what ``hidden`` returns."""
        embedding = self.output_embedding.astype(x.dtype)
        if self.by_output:
            logits = by_outputs(x, embedding, _float32(x))
        else:
            logits = jnp.einsum("btd,vd->btv", x, embedding, preferred_element_type=_float32(x))
        logits = sharding.constrain(logits, "batch", "time", "vocab")
        return soft_capped(logits, self.config.logit_soft_cap)

    def hidden(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, state: dict[str, Any] | None = None
    ) -> tuple[jax.Array, dict[str, Any], Losses]:
        """``[B, T, D]`` after the last norm, which ``output_embedding`` turns into logits, the state, and what the
        layers add to the objective, averaged over them."""
        config = self.config
        if not tokens.shape[1]:
            raise UserError(f"tokens of shape {tokens.shape} have no time step; the model takes at least 1")
        if tokens.shape[1] > 1:
            mixers.check_over_sequence(config.pattern, sharding.parts("time"))
        if state is not None and segment_ids is not None:
            state = _forget_others(state, self.init_state(tokens.shape[0]), segment_ids[:, 0], self.is_stacked)
        # Looked up before the cast, so that the gradient of a frequent token is summed in float32.
        table = sharding.gather_embed(self.embedding[...], ("vocab", "embed"))
        x = jnp.take(table, tokens, axis=0).astype(config.activation_dtype)
        if config.embedding_scale:
            # Rounded as in RecurrentGemma, whatever the dtype of x, so that its weights give the same logits.
            x = x * jnp.asarray(config.width**0.5, jnp.bfloat16).astype(x.dtype)
        x = sharding.constrain(x, "batch", "time", None)

        new: dict[str, Any] = {"segment": _last_segment(tokens, segment_ids, state)}
        losses: Losses = {}
        periods, rest = across_layers(config, self.periods, self.rest)
        if periods is not None:
            run = self._scan if self.is_stacked else self._loop
            x, new["periods"], losses = run(periods, x, segment_ids, None if state is None else state["periods"])
        if rest is not None:
            past = None if state is None else state["rest"]
            graph, parameters = nnx.split(rest)
            run = self._remat(_applied(graph, segment_ids), prevent_cse=True)
            x, (new["rest"], more) = run(x, (parameters, past))
            losses = add(losses, more)
        return self.norm(x), new, {name: loss / config.num_layers for name, loss in losses.items()}

    def _loop(self, periods, x, segment_ids, states):
        new, losses = [], {}
        for i, period in enumerate(periods):
            x, state, more = period(x, segment_ids=segment_ids, state=None if states is None else states[i])
            new.append(state)
            losses = add(losses, more)
        return x, new, losses

    def _scan(self, periods, x, segment_ids, states):
        graph, parameters = nnx.split(periods)
        # The two passes of a loop are apart, those of one that XLA writes out are not.
        step = self._remat(_applied(graph, segment_ids), prevent_cse=self.num_periods == 1)
        x, (states, losses) = lax.scan(step, x, (parameters, states))
        return x, states, jax.tree.map(jnp.sum, losses)

    def _remat(self, function, *, prevent_cse: bool):
        policy = REMAT_POLICIES[self.config.remat]
        return function if policy is None else jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)


def _applied(graph, segment_ids):
    """A period as a function ``(x, (parameters, state)) -> (y, (state, losses))``."""

    def apply(x, xs):
        parameters, state = xs
        x, state, losses = nnx.merge(graph, parameters)(x, segment_ids=segment_ids, state=state)
        return x, (state, losses)

    return apply


def _float32(x: jax.Array) -> jnp.dtype:
    return dtypes.wide(x.dtype)


def _last_segment(tokens, segment_ids, state):
    if segment_ids is not None:
        return segment_ids[:, -1].astype(jnp.int32)
    if state is None:
        return jnp.zeros((tokens.shape[0],), jnp.int32)
    return jnp.where(state["segment"] == _NO_SEGMENT, 0, state["segment"])


def _forget_others(state, empty, segment, stacked):
    """The rows of the state whose document goes on with ``segment`` ``[B]``; the empty past in the others."""
    same = state["segment"] == segment

    def keep(batch_axis):
        def choose(old, new):
            mask = jnp.expand_dims(same, tuple(i for i in range(old.ndim) if i != batch_axis))
            return jnp.where(mask, old, new)

        return choose

    kept = {key: jax.tree.map(keep(1 if stacked and key == "periods" else 0), state[key], empty[key]) for key in state}
    return kept
