"""A mixture of experts in the place of the MLP: each token goes to the few experts that a router chooses for it."""

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

# Of the experts' parameters.
_AXES: dict[str, Axes] = {
    "gate_kernel": ("expert", "embed", "mlp"),
    "up_kernel": ("expert", "embed", "mlp"),
    "down_kernel": ("expert", "mlp", "embed"),
    "gate_bias": ("expert", "mlp"),
    "up_bias": ("expert", "mlp"),
    "down_bias": ("expert", "embed"),
}


class MixtureOfExperts(nnx.Module):
    """``sum_e w_e expert_e(x)`` over the k experts of the largest logits, each a gated MLP; ``[B, T, D]``.

    The weights are the router's probabilities, a softmax over all E experts, divided by their sum over the chosen
    (Mixtral, arXiv:2401.04088, section 2.1). Of one chosen expert alone the weight is its probability (Switch
    Transformer, arXiv:2101.03961, equation 2): divided by itself it would teach the router nothing.

    Experts have no capacity (MegaBlocks, arXiv:2211.15841): pairs of a token and an expert are sorted by expert and
    every pair is computed.
    """

    rounded_parameters = ("gate_kernel", "up_kernel", "down_kernel")

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, experts, inner = config.width, config.experts, config.expert_width
        self.activation, self.experts_per_token = config.mlp_activation, config.experts_per_token
        # Not named a kernel, since it is none for Muon: like an output embedding, it gives logits.
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
        """``(y [B, T, D], losses)``; tokens of segment 0, which is padding, do not count in the losses."""
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
        down_bias = parameters.pop("down_bias", None)  # not split like the others: added where the sums are
        compute = functools.partial(_contributions, of=logits.shape[-1], activation=self.activation)
        y = over_experts(compute, (x, chosen, weights), parameters, _AXES)
        if down_bias is not None:
            each = jnp.einsum("btk,btke->bte", weights, jax.nn.one_hot(chosen, logits.shape[-1], dtype=weights.dtype))
            y = y + dtypes.product("bte,ed->btd", each, down_bias)
        return checkpoint_name(y.astype(x.dtype), "experts"), losses


def _losses(logits, log_normaliser, chosen, segment_ids):
    """``load_balance``: E times the sum over experts of (its share of the choices) * (its mean probability), which is 1
    at perfect balance (Switch Transformer, equation 4, where a token makes one choice). ``router_z``: the mean square of
    the log normaliser (ST-MoE, arXiv:2202.08906, equation 5)."""
    experts = logits.shape[-1]
    counted = jnp.ones(chosen.shape[:2], bool) if segment_ids is None else segment_ids > 0
    counted = counted.astype(logits.dtype)
    share = counted / jnp.maximum(jnp.sum(counted), jnp.ones((), logits.dtype))
    choices = jnp.mean(jax.nn.one_hot(chosen, experts, dtype=logits.dtype), axis=2)
    frequency = jnp.einsum("bt,bte->e", share, choices)
    probability = jnp.einsum("bt,bte->e", share, jnp.exp(logits - log_normaliser[..., None]))
    return {
        "load_balance": experts * jnp.sum(frequency * probability),
        "router_z": jnp.sum(share * log_normaliser**2),
    }


def _contributions(tokens, parameters, first, *, of, activation):
    """What the experts from number ``first`` on, of which these are the parameters, contribute: ``[B, T, D]`` float32.
    There are ``of`` experts in all."""
    x, chosen, weights = tokens
    (batch, length, width), k = x.shape, chosen.shape[-1]
    experts = parameters["gate_kernel"].shape[0]
    pairs = chosen.reshape(-1) - first
    pairs = jnp.where((pairs >= 0) & (pairs < experts), pairs, experts)  # those of other devices' experts come last
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

    rows = _sorted(x.reshape(-1, width), order, back, k)
    inner = ACTIVATIONS[activation](product(rows, "gate")) * product(rows, "up")
    contributions = _sorted(product(inner, "down"), back, order, 1).reshape(batch, length, k, width)
    return jnp.sum(weights[..., None] * contributions.astype(weights.dtype), axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sorted(x, order, back, copies):
    """``[M, D]``: k copies of each row of x ``[M / k, D]`` in ``order``, whose inverse is ``back``. Backward, a gather
    by ``back`` in the place of a scatter, and the copies summed in float32."""
    return jnp.take(x, order // copies, axis=0, mode="clip")


def _sorted_forward(x, order, back, copies):
    return _sorted(x, order, back, copies), back


def _sorted_backward(copies, back, dy):
    dx = jnp.take(dy, back, axis=0, mode="clip").reshape(-1, copies, dy.shape[-1])
    return jnp.sum(dx, axis=1, dtype=dtypes.wide(dy.dtype)).astype(dy.dtype), None, None


_sorted.defvjp(_sorted_forward, _sorted_backward)
