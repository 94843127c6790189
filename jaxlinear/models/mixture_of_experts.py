"""A mixture of experts in place of the MLP: each token goes to the few experts that a router chooses for it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import ACTIVATIONS, Initializer, fan_in_normal, parameter
from jaxlinear.ops import dtypes
from jaxlinear.ops.grouped_product import grouped_product
from jaxlinear.parallel import sharding
from jaxlinear.parallel.experts import Axes, over_experts

# Logical axes of the experts' parameters.
_AXES: dict[str, Axes] = {
    "gate_kernel": ("expert", "embed", "mlp"),
    "up_kernel": ("expert", "embed", "mlp"),
    "down_kernel": ("expert", "mlp", "embed"),
    "gate_bias": ("expert", "mlp"),
    "up_bias": ("expert", "mlp"),
    "down_bias": ("expert", "embed"),
}


class MixtureOfExperts(nnx.Module):
    """``sum_e w_e expert_e(x)`` over the k experts with the largest logits, each a gated MLP; ``[B, T, D]``.

    The weights are the router's probabilities, a softmax over all E experts, divided by their sum over the chosen experts
    (Mixtral, arXiv:2401.04088, section 2.1). If only one is chosen, its weight is its probability (Switch Transformer,
    arXiv:2101.03961, equation 2): divided by itself it would teach the router nothing.

    Experts have no capacity limit (MegaBlocks, arXiv:2211.15841): pairs of a token and an expert are sorted by expert, and
    every pair is computed.
    """

    rounded_parameters = ("gate_kernel", "up_kernel", "down_kernel")

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, experts, inner = config.width, config.experts, config.expert_width
        self.activation, self.experts_per_token = config.mlp_activation, config.experts_per_token
        # Not named a kernel, so that Muon does not treat it as one: like an output embedding, it gives logits.
        self.router = parameter(fan_in_normal(), (width, experts), ("embed", None), rngs)

        def of_experts(name: str, *shape: int, init: Initializer = fan_in_normal()) -> nnx.Param:  # noqa: B008
            return parameter(init, (experts, *shape), _AXES[name], rngs)

        self.gate_kernel = of_experts("gate_kernel", width, inner)
        self.up_kernel = of_experts("up_kernel", width, inner)
        self.down_kernel = of_experts("down_kernel", inner, width, init=fan_in_normal(2 / config.num_layers))
        zeros = nnx.initializers.zeros
        self.gate_bias = of_experts("gate_bias", inner, init=zeros) if config.bias else None
        self.up_bias = of_experts("up_bias", inner, init=zeros) if config.bias else None
        self.down_bias = of_experts("down_bias", width, init=zeros) if config.bias else None

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """``(y [B, T, D], losses)``; tokens of segment 0, which is padding, are left out of the losses."""
        logits = dtypes.product("btd,de->bte", x.astype(dtypes.wide(x.dtype)), self.router[...])
        log_normaliser = jax.nn.logsumexp(logits, axis=-1)
        choose = functools.partial(lax.top_k, k=self.experts_per_token)
        chosen_logits, chosen = sharding.token_by_token(choose, logits)
        if self.experts_per_token > 1:
            weights = jax.nn.softmax(chosen_logits, axis=-1)
        else:
            weights = jnp.exp(chosen_logits - log_normaliser[..., None])
        losses = _losses(logits, log_normaliser, chosen, segment_ids)

        parameters = {name: getattr(self, name)[...] for name in _AXES if getattr(self, name) is not None}
        down_bias = parameters.pop("down_bias", None)  # not split like the others: it is added to the sums
        compute = functools.partial(_contributions, of=logits.shape[-1], activation=self.activation)
        y = over_experts(compute, (x, chosen, weights), parameters, _AXES)
        if down_bias is not None:
            each = dtypes.product(
                "btk,btke->bte", weights, jax.nn.one_hot(chosen, logits.shape[-1], dtype=weights.dtype)
            )
            y = y + dtypes.product("bte,ed->btd", each, down_bias)
        return checkpoint_name(y.astype(x.dtype), "experts"), losses


def _losses(logits, log_normaliser, chosen, segment_ids):
    """``load_balance``: E times the sum over experts of (its share of the choices) * (its mean probability), which is 1 at
    perfect balance (Switch Transformer, equation 4, where a token makes one choice). ``router_z``: the mean square of the
    log normaliser (ST-MoE, arXiv:2202.08906, equation 5). Given the shares of the choices, both are sums over tokens; a
    copy of the parameters that has some of the rows returns its part of them."""
    experts = logits.shape[-1]
    counted = jnp.ones(chosen.shape[:2], bool) if segment_ids is None else segment_ids > 0
    counted = counted.astype(logits.dtype)
    share = counted / jnp.maximum(sharding.summed_over_all_copies(jnp.sum(counted)), jnp.ones((), logits.dtype))
    choices = jnp.mean(jax.nn.one_hot(chosen, experts, dtype=logits.dtype), axis=2)
    frequency = sharding.summed_over_all_copies(dtypes.product("bt,bte->e", share, choices))
    probability = dtypes.product("bt,bte->e", share, jnp.exp(logits - log_normaliser[..., None]))
    return {
        "load_balance": experts * jnp.sum(frequency * probability),
        "router_z": jnp.sum(share * log_normaliser**2),
    }


def _contributions(tokens, parameters, first, *, of, activation):
    """The contribution of the experts from number ``first`` on, whose parameters these are: ``[B, T, D]`` float32. ``of``:
    the number of all experts."""
    x, chosen, weights = tokens
    (batch, length), k = x.shape[:2], chosen.shape[-1]
    experts = parameters["gate_kernel"].shape[0]
    pairs = chosen.reshape(-1) - first
    pairs = jnp.where((pairs >= 0) & (pairs < experts), pairs, experts)  # pairs of other devices' experts come last
    order = jnp.argsort(pairs, stable=True).astype(jnp.int32)
    back = jnp.argsort(order).astype(jnp.int32)
    group = jnp.minimum(pairs[order], experts - 1)
    sizes = jnp.sum(pairs[:, None] == jnp.arange(experts, dtype=pairs.dtype)[None], axis=0, dtype=jnp.int32)
    share = -(-pairs.size * experts // of)  # of the pairs, on average over the devices

    def product(rows, name):
        y = grouped_product(rows, parameters[f"{name}_kernel"], sizes, rows=share)
        bias = parameters.get(f"{name}_bias")
        if bias is None:
            return y
        # Added in float32, so that the gradient of the bias is summed in float32.
        wide = y.astype(dtypes.wide(y.dtype))
        return (wide + jnp.take(bias, group, axis=0, mode="clip").astype(wide.dtype)).astype(y.dtype)

    places = jnp.moveaxis(back.reshape(batch, length, k), 2, 0)
    rows = _dispatched(x, order, places)
    inner = ACTIVATIONS[activation](product(rows, "gate")) * product(rows, "up")
    return _combined(product(inner, "down"), weights, order, places)


# Tokens [B, T, D] are copied to rows [M, D], one per pair of a token and an expert, in the order of the experts: row m is
# pair order[m], and row places[j, b, t] is that of a token's j-th expert. In both directions, and in the backward pass,
# rows are gathered and never scattered. A token's rows are added one after another: otherwise XLA for TPUs would write
# [B, T, k, D] in float32.


@jax.custom_vjp
def _dispatched(x, order, places):
    return jnp.take(x.reshape(-1, x.shape[-1]), order // len(places), axis=0, mode="clip")


def _dispatched_forward(x, order, places):
    return _dispatched(x, order, places), places


def _dispatched_backward(places, d_rows):
    wide = dtypes.wide(d_rows.dtype)
    taken = jnp.take(d_rows, places, axis=0, mode="clip")
    return functools.reduce(jnp.add, (row.astype(wide) for row in taken)).astype(d_rows.dtype), None, None


_dispatched.defvjp(_dispatched_forward, _dispatched_backward)


@jax.custom_vjp
def _combined(rows, weights, order, places):
    """``[B, T, D]`` in the dtype of the weights ``[B, T, k]``: the sum of each token's rows times their weights."""
    taken = jnp.take(rows, places, axis=0, mode="clip")
    return functools.reduce(jnp.add, (weights[..., j, None] * row.astype(weights.dtype) for j, row in enumerate(taken)))


def _combined_forward(rows, weights, order, places):
    return _combined(rows, weights, order, places), (rows, weights, order, places)


def _combined_backward(residuals, dy):
    rows, weights, order, places = residuals
    # The cast loses nothing: the sum is rounded to the dtype of the rows, and so was its gradient.
    dy = jnp.take(dy.astype(rows.dtype).reshape(-1, dy.shape[-1]), order // len(places), axis=0, mode="clip")
    dy = dy.astype(weights.dtype)
    d_rows = jnp.take(weights.ravel(), order, mode="clip")[:, None] * dy
    d_weights = jnp.take(jnp.sum(dy * rows.astype(dy.dtype), axis=1), places, mode="clip")
    return d_rows.astype(rows.dtype), jnp.moveaxis(d_weights, 0, 2), None, None


_combined.defvjp(_combined_forward, _combined_backward)
