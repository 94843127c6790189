"""The mixers based on linear attention: gla, hgrn2, lightning, linear_attention, retention."""

import numpy as np

from tests import oracles


def silu(x):
    return x * oracles.sigmoid(x)


def heads(x, count):
    return x.reshape(*x.shape[:2], count, -1)


def attend(q, k, v, log_decay, *, scale, ids):
    """The recurrence, one head of one token at a time; log_decay broadcasts to ``[B, T, H, K]``."""
    batch, length, count, width = q.shape
    log_decay = np.broadcast_to(log_decay, q.shape)
    starts = oracles.document_starts(ids, batch, length)
    o = np.zeros(v.shape)
    for b in range(batch):
        for h in range(count):
            for t in range(length):
                if t == starts[b, t]:
                    state = np.zeros((width, v.shape[-1]))
                state = np.exp(log_decay[b, t, h])[:, None] * state + np.outer(k[b, t, h], v[b, t, h])
                o[b, t, h] = scale * q[b, t, h] @ state
    return o


def flat_rms(x, epsilon=1e-6):
    """RMS norm over all heads together, without a learned scale."""
    x = x.reshape(*x.shape[:2], -1)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


def gla(parameters, x, ids, config):
    q, k, v, gate = (
        heads(oracles.linear(parameters[name], x), config.heads) for name in ("query", "key", "value", "gate")
    )
    logits = oracles.linear(parameters["decay_out"], oracles.linear(parameters["decay_in"], x))
    log_decay = np.log(oracles.sigmoid(heads(logits, config.heads)) ** (1 / 16))
    o = attend(q, k, v, log_decay, scale=k.shape[-1] ** -0.5, ids=ids)
    y = silu(gate) * oracles.rms_norm(parameters["norm"], o)
    return oracles.linear(parameters["out"], y.reshape(*x.shape[:2], -1))


def retention(parameters, x, ids, config):
    """Positions count from each document's first token."""
    q, k, v, gate = (
        heads(oracles.linear(parameters[name], x), config.heads) for name in ("query", "key", "value", "gate")
    )
    positions = np.arange(x.shape[1])[None] - oracles.document_starts(ids, *x.shape[:2])
    q, k = (oracles.rotary(y, positions, fraction=config.rotary_fraction, base=config.rotary_base) for y in (q, k))
    decay = np.array([1 - 2.0 ** (-5 - h) for h in range(config.heads)])
    o = attend(q, k, v, np.log(decay)[:, None], scale=k.shape[-1] ** -0.5, ids=ids)
    if config.head_norm == "rms":
        o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6) * (1 + parameters["norm"]["scale"])
    else:
        o = (o - o.mean(axis=-1, keepdims=True)) / np.sqrt(np.var(o, axis=-1, keepdims=True) + 1e-6)
    y = silu(gate) * o
    return oracles.linear(parameters["out"], y.reshape(*x.shape[:2], -1))


def lightning(parameters, x, ids, config):
    """The decays are among the parameters."""
    q, k, v = (heads(oracles.linear(parameters[name], x), config.heads) for name in ("query", "key", "value"))
    o = attend(silu(q), silu(k), v, parameters["log_decay"][:, None], scale=1.0, ids=ids)
    return oracles.linear(parameters["out"], oracles.linear(parameters["gate"], x) * flat_rms(o))


def hgrn2(parameters, x, ids, config):
    """``lower_bound`` is the bound itself."""
    count = config.recurrent_heads or config.width // config.key_width
    bound = parameters["lower_bound"]
    forget = bound + (1 - bound) * oracles.sigmoid(oracles.linear(parameters["forget"], x))
    q, v = (heads(oracles.linear(parameters[name], x), count) for name in ("query", "value"))
    forget = heads(forget, count)
    o = attend(silu(q), 1 - forget, v, np.log(forget), scale=q.shape[-1] ** -0.5, ids=ids)
    normal = flat_rms(o, config.output_norm_epsilon or 1e-6)
    return oracles.linear(parameters["out"], normal * (1 + parameters["norm"]["scale"]))


def _elu(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def _rebased(parameters, x):
    """x ``[H, K]``, rescaled to its size at scale 1 and bias 0."""
    scale, bias = (parameters[name].reshape(x.shape) for name in ("scale", "bias"))
    size = np.sqrt(np.mean(scale**2 + bias**2, axis=-1, keepdims=True))
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(np.var(x, axis=-1, keepdims=True) + 1e-5)
    return (x * scale + bias) / size


def _hedgehog(parameters, x):
    x = np.stack([x[h] @ parameters["kernel"][h] for h in range(len(x))])
    return np.concatenate([np.exp(oracles.log_softmax(x)), np.exp(oracles.log_softmax(-x))], axis=-1)


def weights(parameters, q, k, feature_map):
    """The weight that a query gives to a key: q, k ``[H, K]`` -> ``[H]``."""
    product = np.sum(q * k, axis=-1)
    if feature_map == "identity":
        return product / np.sqrt(q.shape[-1])
    if feature_map == "elu":
        return np.sum(_elu(q) * _elu(k), axis=-1)
    if feature_map == "relu":
        return np.sum(np.maximum(q, 0) * np.maximum(k, 0), axis=-1)
    if feature_map == "taylor":
        s = product / np.sqrt(q.shape[-1])
        return 1 + s + s**2 / 2
    if feature_map == "rebased":
        return np.mean(_rebased(parameters["query_map"], q) * _rebased(parameters["key_map"], k), axis=-1) ** 2
    assert feature_map == "hedgehog"
    return np.sum(_hedgehog(parameters["query_map"], q) * _hedgehog(parameters["key_map"], k), axis=-1)


def linear_attention(parameters, x, ids, config):
    """Computes the weight of every pair of tokens, without features."""
    q, k, v = (heads(oracles.linear(parameters[name], x), config.heads) for name in ("query", "key", "value"))
    starts = oracles.document_starts(ids, *x.shape[:2])
    o = np.zeros(v.shape)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = np.zeros((config.heads, 1))
            for s in range(starts[b, t], t + 1):
                weight = weights(parameters, q[b, t], k[b, s], config.feature_map)[:, None]
                total += weight
                o[b, t] += weight * v[b, s]
            if config.feature_map != "identity":
                o[b, t] /= total + (1e-6 if config.feature_map in ("relu", "rebased") else 0)
    if config.feature_map == "identity":
        o = oracles.rms_norm(parameters["norm"], o)
    return oracles.linear(parameters["out"], o.reshape(*x.shape[:2], -1))


ORACLES = {
    "gla": gla,
    "hgrn2": hgrn2,
    "lightning": lightning,
    "linear_attention": linear_attention,
    "retention": retention,
}
