"""The oracles transcribed to jax.numpy in the plainest differentiable form."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _new_document(ids, shape):
    if ids is None:
        return jnp.zeros(shape, bool)
    return jnp.concatenate([jnp.zeros_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)


def linear_recurrence(a, x, initial_state=None, ids=None, reverse=False):
    if reverse:
        a, x, ids = (None if y is None else jnp.flip(y, 1) if y.ndim >= 2 else y for y in (a, x, ids))
    total = np.result_type(a.dtype, x.dtype)
    a = jnp.broadcast_to(a.reshape((1,) * (x.ndim - a.ndim) + a.shape), x.shape).astype(total)
    state = jnp.zeros((x.shape[0], *x.shape[2:]), total) if initial_state is None else initial_state.astype(total)
    new = _new_document(ids, x.shape[:2])

    def step(state, xs):
        at, xt, new = xs
        new = new.reshape(new.shape + (1,) * (state.ndim - 1))
        state = at * jnp.where(new, jnp.zeros_like(state), state) + xt
        return state, state

    final, h = lax.scan(step, state, [jnp.moveaxis(y, 1, 0) for y in (a, x.astype(total), new)])
    h = jnp.moveaxis(h, 0, 1)
    return jnp.flip(h, 1) if reverse else h, final


def linear_attention(q, k, v, log_decay=None, initial_state=None, ids=None, scale=None):
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    if log_decay is None:
        log_decay = jnp.zeros((heads,), q.dtype)
    if log_decay.ndim < 4:
        log_decay = log_decay[..., None]
    decay = jnp.exp(jnp.broadcast_to(log_decay.reshape((1,) * (4 - log_decay.ndim) + log_decay.shape), q.shape))
    state = jnp.zeros((batch, heads, width, v.shape[-1]), q.dtype) if initial_state is None else initial_state

    def step(state, xs):
        qt, kt, vt, at, new = xs
        state = jnp.where(new[:, None, None, None], jnp.zeros_like(state), state)
        state = at[..., None] * state + jnp.einsum("bhk,bhv->bhkv", kt, vt)
        return state, scale * jnp.einsum("bhkv,bhk->bhv", state, qt)

    new = _new_document(ids, (batch, length))
    final, o = lax.scan(step, state, [jnp.moveaxis(y, 1, 0) for y in (q, k, v, decay, new)])
    return jnp.moveaxis(o, 0, 1), final


def delta_rule(q, k, v, beta, log_decay=None, initial_state=None, ids=None, scale=None):
    batch, length, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    log_decay = jnp.zeros_like(beta) if log_decay is None else log_decay
    decay = jnp.exp(jnp.broadcast_to(log_decay if log_decay.ndim == 4 else log_decay[..., None], q.shape))
    state = jnp.zeros((batch, heads, width, v.shape[-1]), q.dtype) if initial_state is None else initial_state

    def step(state, xs):
        qt, kt, vt, bt, at, new = xs
        state = at[..., None] * jnp.where(new[:, None, None, None], jnp.zeros_like(state), state)
        error = vt - jnp.einsum("bhkv,bhk->bhv", state, kt)
        state = state + jnp.einsum("bh,bhk,bhv->bhkv", bt, kt, error)
        return state, scale * jnp.einsum("bhkv,bhk->bhv", state, qt)

    new = _new_document(ids, (batch, length))
    final, o = lax.scan(step, state, [jnp.moveaxis(y, 1, 0) for y in (q, k, v, beta, decay, new)])
    return jnp.moveaxis(o, 0, 1), final


def selective_scan(x, dt, A, B, C, initial_state, ids=None):
    """Element-wise on the states ``[B, T, D, N]``, which all exist at once."""
    a = 1 - dt[..., None] * B[:, :, None] ** 2 if A is None else jnp.exp(dt[..., None] * A[None, None])
    states, final = linear_recurrence(a, (dt * x)[..., None] * B[:, :, None], initial_state, ids)
    return jnp.sum(states * C[:, :, None], axis=-1), final


def causal_convolution(x, kernel, bias, state, ids=None):
    """A scan whose state is the window."""

    def step(window, xs):
        xt, new = xs
        window = jnp.where(new[:, None, None], jnp.zeros_like(window), window)
        window = jnp.concatenate([window, xt[:, None]], axis=1)
        return window[:, 1:], jnp.sum(window * kernel[None], axis=1) + bias[None]

    final, y = lax.scan(step, state, (jnp.moveaxis(x, 1, 0), _new_document(ids, x.shape[:2]).T))
    return jnp.moveaxis(y, 0, 1), final


def short_convolution(x, kernel, bias, state, head_width=None, ids=None, activation="silu"):
    z, final = causal_convolution(x, kernel, bias, state, ids)
    y = z / (1 + jnp.exp(-z)) if activation == "silu" else z
    if head_width is not None:
        of_heads = y.reshape(*y.shape[:2], -1, head_width)
        y = (of_heads / jnp.sqrt(jnp.sum(of_heads**2, axis=-1, keepdims=True) + 1e-6)).reshape(y.shape)
    return y, final


def gated_rms_norm(x, gate, scale, skipped=None, skip=None, *, epsilon, norm_before_gate=False, activation="silu"):
    factor = (gate if activation == "silu" else 1) / (1 + jnp.exp(-gate))
    n = x if skipped is None else x + skip[None, None] * skipped
    if not norm_before_gate:
        n = n * factor
    of_heads = n.reshape(*n.shape[:2], -1, scale.shape[0])
    of_heads = of_heads / jnp.sqrt(jnp.mean(of_heads**2, axis=-1, keepdims=True) + epsilon) * scale[None, None, None]
    y = of_heads.reshape(x.shape)
    return y * factor if norm_before_gate else y


def sliding_window_attention(q, k, v, *, window, scale=None, ids=None):
    """Masks the full matrix of logits."""
    batch, length, heads, width = q.shape
    total, repeats = k.shape[1], heads // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    logits = jnp.einsum("bthk,bshk->bhts", q, k) * (width**-0.5 if scale is None else scale)
    query, key = jnp.arange(length)[:, None] + total - length, jnp.arange(total)[None]
    seen = jnp.broadcast_to((key <= query) & (key > query - window), (batch, length, total))
    document = jnp.cumsum(_new_document(ids, (batch, total)), axis=1)
    seen &= document[:, total - length :, None] == document[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, v)


def linear_cross_entropy(x, embedding, targets, weights, *, soft_cap=0.0, z_loss=0.0):
    logits = jnp.einsum("btd,vd->btv", x, embedding)
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(weights * losses), jnp.sum(weights * (losses + z_loss * log_z**2))


def rg_lru(parameters, x, ids=None):
    """Gates, decay, first-token rule and recurrence, from an empty past."""
    gates = (parameters[f"{gate}_{kind}"] for gate in ("recurrence", "input") for kind in ("kernel", "bias"))
    first = _new_document(ids, x.shape[:2]).at[:, 0].set(True)
    a, u = rg_lru_gates(x, *gates, -8 * jnp.log(1 + jnp.exp(parameters["decay"])), first)
    return linear_recurrence(a, u, ids=ids)


def rg_lru_gates(x, recurrence_kernel, recurrence_bias, input_kernel, input_bias, rate, first):
    def gate(kernel, bias):
        product = jnp.einsum("bthi,hij->bthj", x.reshape(*x.shape[:2], len(kernel), -1), kernel)
        return 1 / (1 + jnp.exp(-product.reshape(x.shape) - bias[None, None]))

    log_a = rate[None, None] * gate(recurrence_kernel, recurrence_bias)
    weight = jnp.where(first[..., None], 1.0, jnp.sqrt(-jnp.expm1(2 * log_a)))
    return jnp.exp(log_a), weight * gate(input_kernel, input_bias) * x
