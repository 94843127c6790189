"""The language model: embeddings, stacks of blocks scanned over the repetitions of their patterns, a last norm, logits."""

import functools
from collections.abc import Callable, Iterator
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
from jaxlinear.models.cached_attention import CachedAttention
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, RMSNorm, by_outputs, parameter, round_for_decoding
from jaxlinear.models.stacks import Stack
from jaxlinear.ops import backends, dtypes
from jaxlinear.ops.cross_entropy import soft_capped
from jaxlinear.parallel import operations, sharding
from jaxlinear.parallel.exchanges import EXCHANGED

_NO_SEGMENT = -1  # in a state that has seen no token

# How much of a run of blocks the backward pass recomputes rather than reads back. Elementwise work is cheaper to repeat
# than to write and read.
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

    The layers are cut into stacks (``config.stacks``). The repetitions of a stack's pattern are one module with stacked
    parameters, which is scanned, so neither the program nor its compile time grows with depth.
    """

    rounded_parameters = ("embedding", "head")

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.is_for_decoding = False
        self.by_output = False  # the layout of linear maps, see `for_decoding`
        init = nnx.initializers.normal(config.width**-0.5)
        self.embedding = parameter(init, (config.vocab_size, config.width), ("vocab", "embed"), rngs)
        self.stacks: Any = nnx.List([_stacked(config, stack, rngs) for stack in config.stacks])
        self.norm = RMSNorm(config.width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        self.head = (
            None
            if config.tied_embeddings
            else parameter(init, (config.vocab_size, config.width), ("vocab", "embed"), rngs)
        )

    @property
    def is_stacked(self) -> bool:
        """Whether the repetitions of each stack are one module with stacked parameters and stacked states."""
        return not isinstance(self.stacks[0], nnx.List)

    def unstacked(self) -> "LanguageModel":
        """The same model, with separate arrays for the parameters and state of each repetition.

        This is for decoding, where a scan would copy the parameters and state of a repetition out of the stacks for every
        token. The program and its compile time then grow with depth.
        """
        return self._unstacked(lambda period: None) if self.is_stacked else self

    def _unstacked(self, change: Callable[[Period], None]) -> "LanguageModel":
        """Changes each repetition before the next is taken out, so that only one at a time exists in both forms."""
        model = nnx.clone(self)
        stacks = []
        for module, stack in model._each(model.stacks):
            periods: Any = nnx.List()
            for i in range(stack.repeats):
                periods.append(_repetition(module, i) if self.is_stacked else module[i])
                change(periods[i])
            stacks.append(periods)
        model.stacks = nnx.List(stacks)
        return model

    def for_decoding(self) -> "LanguageModel":
        """``unstacked``, with the parameters that are read only in the activation dtype rounded to it and, on a single CPU,
        with the kernels of linear maps laid out for products with few tokens."""
        if self.is_for_decoding:
            return self
        first, *others = jnp.asarray(self.embedding[...]).devices()
        by_output = not others and first.platform == "cpu"

        def change(period: Period) -> None:
            round_for_decoding(period, self.config.activation_dtype)
            for _, module in nnx.iter_graph(period):
                if by_output and isinstance(module, Linear):
                    module.turn()

        model = self._unstacked(change)
        round_for_decoding(model, self.config.activation_dtype)
        model.by_output, model.is_for_decoding = by_output, True
        return model

    def remember(self, tokens: int) -> None:
        """Limits this model's attention states, in place, to ``tokens`` tokens. If no row gets longer, this changes only
        how much a token reads."""
        for _, module in nnx.iter_graph(self):
            if isinstance(module, CachedAttention):
                module.slots = min(module.slots, tokens)

    def init_state(self, batch: int) -> dict[str, Any]:
        """The empty past of ``batch`` rows."""
        return {
            "segment": jnp.full((batch,), _NO_SEGMENT, jnp.int32),
            "stacks": [self._init_state(module, stack.repeats, batch) for module, stack in self._each(self.stacks)],
        }

    def _init_state(self, module: Any, repeats: int, batch: int) -> Any:
        if not self.is_stacked:
            return [period.init_state(batch) for period in module]
        return jax.tree.map(lambda x: jnp.repeat(x[None], repeats, axis=0), module.init_state(batch))

    def _each(self, modules: Any) -> Iterator[tuple[Any, Stack]]:
        return zip(modules, self.config.stacks, strict=True)

    def __call__(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, state: dict[str, Any] | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits for the token after each token, and the state after the last.

        ``segment_ids`` ``[B, T]``: documents do not see each other. A state that is passed on continues the document it
        ended in; a row whose next segment id differs starts from an empty past.
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
        """``[B, T, D]`` after the last norm (which ``output_embedding`` turns into logits), the state, and what the layers
        add to the objective, averaged over layers."""
        config = self.config
        if tokens.ndim != 2:
            raise UserError(f"tokens are {tokens.shape}; they must be [B, T]")
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise UserError(f"segment_ids {segment_ids.shape} must be one per token, [B, T] = {tokens.shape}")
        if state is not None and state["segment"].shape != tokens.shape[:1]:
            raise UserError(f"a state of {len(state['segment'])} rows does not fit tokens {tokens.shape}")
        for size, what in zip(tokens.shape, ("row", "time step"), strict=True):
            if not size:
                raise UserError(f"tokens {tokens.shape} have no {what}; the model needs at least 1")
        if tokens.shape[1] > 1:
            mixers.check_over_sequence(config.layers, sharding.parts("time"))
        if state is not None and segment_ids is not None:
            state = _forget_others(state, self.init_state(tokens.shape[0]), segment_ids[:, 0], self.is_stacked)
        x = operations.rows(self.embedding[...], tokens, config.activation_dtype)
        if config.embedding_scale:
            # Rounded as in RecurrentGemma, whatever the dtype of x, so that its weights give the same logits.
            x = x * jnp.asarray(config.width**0.5, jnp.bfloat16).astype(x.dtype)
        x = sharding.constrain(x, "batch", "time", None)

        new: dict[str, Any] = {"segment": _last_segment(tokens, segment_ids, state), "stacks": []}
        losses: Losses = {}
        run = self._scan if self.is_stacked else self._loop
        with backends.use_kernels(config.kernels):
            for i, (module, stack) in enumerate(self._each(across_layers(config, self.stacks))):
                x, past, more = run(module, stack, x, segment_ids, None if state is None else state["stacks"][i])
                new["stacks"].append(past)
                losses = add(losses, more)
        return self.norm(x), new, {name: loss / config.num_layers for name, loss in losses.items()}

    def _loop(self, periods, stack, x, segment_ids, states):
        new, losses = [], {}
        for i in range(stack.repeats):
            x, state, more = periods[i](x, segment_ids=segment_ids, state=None if states is None else states[i])
            new.append(state)
            losses = add(losses, more)
        return x, new, losses

    def _scan(self, module, stack, x, segment_ids, states):
        graph, parameters = nnx.split(module)
        # A loop keeps the two passes apart; one that XLA unrolls does not.
        remat = self._remat(prevent_cse=stack.repeats == 1)

        def step(x, xs):
            parameters, state = xs
            x, state, losses = nnx.merge(graph, parameters)(x, segment_ids=segment_ids, state=state, remat=remat)
            return x, (state, losses)

        x, (states, losses) = lax.scan(step, x, (parameters, states))
        return x, states, jax.tree.map(jnp.sum, losses)

    def _remat(self, *, prevent_cse: bool) -> Callable[[Callable], Callable]:
        policy = REMAT_POLICIES[self.config.remat]
        if policy is None:
            return lambda function: function
        return functools.partial(jax.checkpoint, policy=policy, prevent_cse=prevent_cse)


def _stacked(config: ModelConfig, stack: Stack, rngs: nnx.Rngs) -> Period:
    """The repetitions of a stack's pattern as one module, whose parameters have a leading axis of repetitions."""

    @nnx.split_rngs(splits=stack.repeats)
    @nnx.vmap(in_axes=(0, 0), out_axes=0)
    def make(rngs: nnx.Rngs, first_layer: jax.Array) -> Period:
        return Period(config, stack.pattern, first_layer=first_layer, rngs=rngs)

    return make(rngs, stack.first + jnp.arange(stack.repeats, dtype=jnp.int32) * len(stack.pattern))


def _repetition(module: Period, i: int) -> Period:
    graph, stacked = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: x[i], stacked))


def _float32(x: jax.Array) -> jnp.dtype:
    return dtypes.wide(x.dtype)


def _last_segment(tokens, segment_ids, state):
    if segment_ids is not None:
        return segment_ids[:, -1].astype(jnp.int32)
    if state is None:
        return jnp.zeros((tokens.shape[0],), jnp.int32)
    return jnp.where(state["segment"] == _NO_SEGMENT, 0, state["segment"])


def _forget_others(state, empty, segment, stacked):
    """The rows of the state whose document continues with ``segment`` ``[B]``, and the empty past in the other rows."""
    same = state["segment"] == segment

    def keep(batch_axis):
        def choose(old, new):
            mask = jnp.expand_dims(same, tuple(i for i in range(old.ndim) if i != batch_axis))
            return jnp.where(mask, old, new)

        return choose

    kept = {key: jax.tree.map(keep(1 if stacked and key == "stacks" else 0), state[key], empty[key]) for key in state}
    return kept
