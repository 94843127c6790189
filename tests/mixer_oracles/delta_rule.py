"""DeltaNet (arXiv:2406.06484), Gated DeltaNet (arXiv:2412.06464), Kimi Delta Attention (arXiv:2510.26692), each with the
updates of DeltaProduct (arXiv:2502.10297), and Mamba-2 (arXiv:2405.21060), one head of one token at a time."""

import numpy as np

from tests import oracles


def delta_net(parameters, x, ids, config):
    o = _delta_rule(*_inputs(parameters["inputs"], x, ids, config), None, ids)
    return _gated(parameters, x, o, config)


def gated_delta_net(parameters, x, ids, config):
    inputs = _inputs(parameters["inputs"], x, ids, config)
    dt = oracles.softplus(oracles.linear(parameters["decay"], x) + parameters["dt_bias"])
    o = _delta_rule(*inputs, np.exp(-np.exp(parameters["A_log"]) * dt)[..., None], ids)
    return _gated(parameters, x, o, config)


def kda(parameters, x, ids, config):
    inputs = _inputs(parameters["inputs"], x, ids, config)
    dt = oracles.softplus(_low_rank(parameters["decay"], x) + parameters["dt_bias"]).reshape(inputs[0].shape)
    o = _delta_rule(*inputs, np.exp(-np.exp(parameters["A_log"])[:, None] * dt), ids)
    gate = _low_rank(parameters["gate"], x).reshape(o.shape)
    return _out(parameters, _norm(parameters["norm"], o, config) * oracles.sigmoid(gate))


def mamba2(parameters, x, ids, config):
    batch, length, _ = x.shape
    heads = len(parameters["A_log"])
    z = oracles.linear(parameters["gate"], x)
    b, c, u = (_convolved(parameters, name, x, ids) for name in ("key", "query", "value"))
    u = u.reshape(batch, length, heads, -1)
    dt = oracles.softplus(oracles.linear(parameters["time_step"], x) + parameters["dt_bias"])
    starts = oracles.document_starts(ids, batch, length)
    y = np.zeros(u.shape)
    for row, h in np.ndindex(batch, heads):
        state = np.zeros((b.shape[-1], u.shape[-1]))
        for t in range(length):
            decay = 0 if t == starts[row, t] else np.exp(-np.exp(parameters["A_log"][h]) * dt[row, t, h])
            state = decay * state + np.outer(b[row, t], dt[row, t, h] * u[row, t, h])
            y[row, t, h] = state.T @ c[row, t] + parameters["D"][h] * u[row, t, h]
    return oracles.linear(parameters["out"], _norm(parameters["norm"], y.reshape(z.shape) * silu(z), config))


def silu(x):
    return x * oracles.sigmoid(x)


def _inputs(parameters, x, ids, config):
    """q ``[B, T, H, K]``; for J updates k ``[B, T, H, J, K]``, v ``[B, T, H, J, V]`` and beta ``[B, T, H, J]``."""
    q, k, v = (_convolved(parameters, name, x, ids) for name in ("query", "key", "value"))
    heads, of_updates = (*x.shape[:2], config.heads), (*x.shape[:2], config.heads, config.householders)
    q, k, v = q.reshape(*heads, -1), k.reshape(*of_updates, -1), v.reshape(*of_updates, -1)
    q, k = (y / np.sqrt(np.sum(y**2, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
    beta = oracles.sigmoid(oracles.linear(parameters["beta"], x)).reshape(of_updates)
    return q, k, v, (1 + config.negative_eigenvalues) * beta


def _convolved(parameters, name, x, ids):
    filters = parameters[f"{name}_convolution"]
    y = oracles.linear(parameters[name], x)
    return silu(
        oracles.causal_convolution(y, filters["convolution_kernel"], filters.get("convolution_bias"), ids=ids)[0]
    )


def _delta_rule(q, k, v, beta, decay, ids):
    """decay: None, ``[B, T, H, 1]`` or ``[B, T, H, K]`` -> o."""
    batch, length, heads, width = q.shape
    decay = np.ones(q.shape) if decay is None else np.broadcast_to(decay, q.shape)
    starts = oracles.document_starts(ids, batch, length)
    o = np.zeros((batch, length, heads, v.shape[-1]))
    for b, h in np.ndindex(batch, heads):
        state = np.zeros((width, v.shape[-1]))
        for t in range(length):
            state = 0 * state if t == starts[b, t] else decay[b, t, h][:, None] * state
            for key, value, replaced in zip(k[b, t, h], v[b, t, h], beta[b, t, h], strict=True):
                state = (np.eye(width) - replaced * np.outer(key, key)) @ state + replaced * np.outer(key, value)
            o[b, t, h] = width**-0.5 * state.T @ q[b, t, h]
    return o


def _gated(parameters, x, o, config):
    gate = silu(oracles.linear(parameters["gate"], x)).reshape(o.shape) if "gate" in parameters else 1
    return _out(parameters, _norm(parameters["norm"], o, config) * gate)


def _low_rank(parameters, x):
    return oracles.linear(parameters["up"], oracles.linear(parameters["down"], x))


def _norm(parameters, x, config):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon) * (1 + parameters["scale"])


def _out(parameters, o):
    return oracles.linear(parameters["out"], o.reshape(*o.shape[:2], -1))


ORACLES = {"delta_net": delta_net, "gated_delta_net": gated_delta_net, "kda": kda, "mamba2": mamba2}
