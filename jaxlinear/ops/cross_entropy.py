"""Next-token cross-entropy straight from the hidden states, a slice of time at a time.

The logits of a whole batch, [B, T, vocab] in float32, are often the largest array of a training step. Here only one
slice of them exists at a time. The loss is one number, so the gradients of a slice are known as soon as its logits are:
they are taken in the forward pass and the logits are dropped, and the backward pass recomputes nothing.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import backends, dtypes

# Logits per slice, in elements. On an accelerator: enough for full matrix speed, but few beside the activations of a batch.
# On CPU: what stays in the cache, since each pass over more than that costs as much as the matrix product.
_SLICE_ELEMENTS = {"cpu": 1 << 21}
_SLICE_ELEMENTS_ELSEWHERE = 1 << 26


def linear_cross_entropy(
    x: jax.Array,
    embedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    soft_cap: float = 0.0,
    z_loss: float = 0.0,
    groups: int = 1,
    whole: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``sum(weights * nll)`` and ``sum(weights * (nll + z_loss * log_z**2))`` of logits ``x @ embedding.T``.

    Args:
      x: ``[B, T, D]`` hidden states.
      embedding: ``[vocab, D]``.
      targets: ``[B, T]`` int.
      weights: ``[B, T]`` float32, usually 1 / (number of targets), 0 where nothing is to be predicted. No gradient.
      soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``; 0 means none.
      z_loss: weight of the squared log normaliser (PaLM, arXiv:2204.02311, section 5).
      groups: the number of parts of the batch for which the embedding's gradient is summed separately before the parts are
        added: the number of devices that share the batch, which then exchange it once rather than once per slice. A slice
        is sized for one of them.
      whole: the embedding as used in the products, in the dtype of x: a copy gathered from those devices. The gradient is
        still that of ``embedding``, in its dtype.

    Returns:
      Two float32 scalars: the cross-entropy, which carries no gradient, and the objective, which does.
    """
    statics = (soft_cap, z_loss, groups)
    weights = lax.stop_gradient(weights).astype(dtypes.wide(x.dtype))
    nll, objective = _objective(x, embedding, whole, targets, weights, statics)
    return lax.stop_gradient(nll), objective


def token_losses(
    x: jax.Array, embedding: jax.Array, targets: jax.Array, *, soft_cap: float = 0.0, groups: int = 1
) -> jax.Array:
    """The negative log-likelihood of each target in nats, ``[B, T]`` float32. For evaluation: no gradient."""
    x, embedding, targets = lax.stop_gradient((x, embedding, targets))

    def step(carry, xs):
        logits = _logits(xs[0], embedding, soft_cap)
        return carry, jax.nn.logsumexp(logits, axis=-1) - _pick(logits, xs[1])

    slices = _slices(x, embedding, groups)
    _, nll = lax.scan(step, None, (_split(x, slices), _split(targets, slices)))
    return _join(nll, targets.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _objective(x, embedding, whole, targets, weights, statics):
    return _forward(x, embedding, whole, targets, weights, statics, gradients=False)[0]


def _objective_forward(x, embedding, whole, targets, weights, statics):
    return _forward(x, embedding, whole, targets, weights, statics, gradients=True)


def _objective_backward(statics, residuals, cotangents):
    dx, d_embedding = residuals
    scale = cotangents[1]
    return dx * scale.astype(dx.dtype), d_embedding * scale.astype(d_embedding.dtype), None, None, None


def _forward(x, embedding, whole, targets, weights, statics, gradients):
    soft_cap, z_loss, groups = statics
    dtype, embedding = embedding.dtype, embedding if whole is None else whole
    slices = _slices(x, embedding, groups)
    total = dtypes.wide(x.dtype)

    def step(carry, xs):
        xi, ti, wi = xs
        nll, objective, d_embedding = carry
        logits = _logits(xi, embedding, soft_cap)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        exponentials = jnp.exp(logits - peak)
        normaliser = jnp.sum(exponentials, axis=-1, keepdims=True)
        log_z = (peak + jnp.log(normaliser))[..., 0]
        losses = log_z - _pick(logits, ti)
        nll += jnp.sum(wi * losses)
        objective += jnp.sum(wi * (losses + z_loss * log_z**2))
        if not gradients:
            return (nll, objective, d_embedding), None
        scale = wi * (1 + 2 * z_loss * log_z)
        dlogits = exponentials * (scale[..., None] / normaliser)
        dlogits -= jnp.where(_one_hot(ti, logits), wi[..., None], jnp.zeros((), logits.dtype))
        if soft_cap:
            dlogits *= 1 - (logits / soft_cap) ** 2
        dlogits = dlogits.astype(x.dtype)
        dxi = jnp.einsum("btv,vd->btd", dlogits, embedding.astype(x.dtype))
        # XLA for CPUs lacks the transposed product of bfloat16 matrices with a float32 result.
        own = total if backends.platform() == "cpu" else x.dtype
        grouped = [y.reshape(groups, -1, *y.shape[1:]).astype(own) for y in (dlogits, xi)]
        # Channels before the vocabulary, so that the smaller operand is the one transposed for the product.
        d_embedding += jnp.einsum("gbtv,gbtd->gdv", *grouped, preferred_element_type=total)
        return (nll, objective, d_embedding), dxi

    zero = jnp.zeros((), total)
    carry = (zero, zero, jnp.zeros((groups, *embedding.shape[::-1]), total) if gradients else None)
    xs = (_split(x, slices), _split(targets, slices), _split(weights, slices))
    (nll, objective, d_embedding), dx = lax.scan(step, carry, xs)
    if not gradients:
        return (nll, objective), None
    return (nll, objective), (_join(dx, x.shape[1]), jnp.sum(d_embedding, axis=0).T.astype(dtype))


_objective.defvjp(_objective_forward, _objective_backward)


def soft_capped(logits: jax.Array, soft_cap: float) -> jax.Array:
    """``soft_cap * tanh(logits / soft_cap)``, or the logits as they are if ``soft_cap`` is 0."""
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


def _logits(x, embedding, soft_cap):
    compute = dtypes.wide(x.dtype)
    logits = jnp.einsum("btd,vd->btv", x, embedding.astype(x.dtype), preferred_element_type=compute)
    return soft_capped(logits, soft_cap)


def _one_hot(targets, logits):
    """``[B, T, vocab]`` bool. A comparison, since a gather by index does not partition over the vocabulary."""
    return targets[..., None] == lax.broadcasted_iota(targets.dtype, (1, 1, logits.shape[-1]), 2)


def _pick(logits, targets):
    return jnp.sum(jnp.where(_one_hot(targets, logits), logits, jnp.zeros((), logits.dtype)), axis=-1)


def _slices(x, embedding, groups):
    elements = groups * _SLICE_ELEMENTS.get(backends.platform(), _SLICE_ELEMENTS_ELSEWHERE)
    return min(x.shape[1], math.ceil(x.shape[0] * x.shape[1] * embedding.shape[0] / elements))


def _split(x, slices):
    """``[B, T, ...]`` -> ``[slices, B, ceil(T / slices), ...]``, padded with zeros (whose weight is 0)."""
    size = math.ceil(x.shape[1] / slices)
    x = jnp.pad(x, ((0, 0), (0, slices * size - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], slices, size, *x.shape[2:]), 1, 0)


def _join(x, length):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
