"""LRU (arXiv:2303.06349), S5 (arXiv:2208.04933), GateLoop (arXiv:2311.01927), HGRN (arXiv:2311.04823), Mamba
(arXiv:2312.00752) and Longhorn (arXiv:2407.14207), one token at a time."""

import numpy as np

from tests import oracles


def lru(parameters, x, ids, config):
    a = np.exp(-np.exp(parameters["nu"]) + 1j * np.exp(parameters["theta"]))
    b, c = (_complex(parameters[name]) for name in ("input_kernel", "output_kernel"))
    h = _run(np.broadcast_to(a, (*x.shape[:2], len(a))), np.exp(parameters["gamma"]) * (x @ b), ids)
    z = (h @ c).real + parameters["skip"] * x
    return oracles.linear(parameters["value"], z) * oracles.sigmoid(oracles.linear(parameters["gate"], z))


def s5(parameters, x, ids, config):
    z = oracles.gelu(s5_states(parameters, x, ids, config.discretization) + parameters["skip"] * x)
    return z * oracles.sigmoid(oracles.linear(parameters["gate"], z))


def s5_states(parameters, x, ids, discretization):
    """What is read from the states, ``[B, T, D]``: all P of them, each eigenvalue with its conjugate."""
    eigenvalues = -np.exp(parameters["log_rate"]) + 1j * parameters["frequency"]
    b, c = (_complex(parameters[name]) for name in ("input_kernel", "output_kernel"))
    eigenvalues, b, c = (np.concatenate([y, y.conj()], axis) for y, axis in ((eigenvalues, 0), (b, 1), (c, 0)))
    step = np.exp(np.tile(parameters["log_step"], 2))
    if discretization == "bilinear":
        inverse = 1 / (1 - step / 2 * eigenvalues)
        a, b = inverse * (1 + step / 2 * eigenvalues), inverse * step * b
    else:
        a = np.exp(eigenvalues * step)
        b = (a - 1) / eigenvalues * b
    y = _run(np.broadcast_to(a, (*x.shape[:2], len(a))), x @ b, ids) @ c
    assert np.abs(y.imag).max() < 1e-10 * np.abs(y.real).max()
    return y.real


def gateloop(parameters, x, ids, config):
    q, k, v, alpha, beta, gate = (
        oracles.linear(parameters[name], x) for name in ("query", "key", "value", "magnitude", "phase", "gate")
    )
    alpha, beta = alpha + parameters["magnitude_bias"], beta + parameters["phase_bias"]
    o = q * _run(oracles.sigmoid(alpha) * np.exp(1j * beta), k * v, ids).real
    o = oracles.rms_norm(parameters["norm"], o.reshape(*x.shape[:2], config.heads, -1)).reshape(o.shape)
    return oracles.linear(parameters["out"], gate * oracles.sigmoid(gate) * o)


def hgrn(parameters, x, ids, config):
    """``lower_bound`` is the bound itself."""
    inner, forget, gate = (oracles.linear(parameters[name], x) for name in ("input", "forget", "gate"))
    bound = parameters["lower_bound"]
    forget = bound + (1 - bound) * oracles.sigmoid(forget)
    h = _run(forget, (1 - forget) * oracles.silu(inner), ids)
    return oracles.linear(parameters["out"], oracles.rms_norm(parameters["norm"], h) * oracles.silu(gate))


def mamba(parameters, x, ids, config):
    v, low, b, c = _selection(parameters, x, ids, config)
    if config.selection_norm:
        epsilon = config.selection_norm_epsilon or config.norm_epsilon
        low, b, c = (y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + epsilon) for y in (low, b, c))
    dt = oracles.softplus(oracles.linear(parameters["time_step"], low) + parameters["dt_bias"])
    y = oracles.selective_scan(v, dt, -np.exp(parameters["A_log"]), b, c, ids=ids)[0]
    return _gated(parameters, x, y + parameters["D"] * v)


def longhorn(parameters, x, ids, config):
    """Each number of a channel's state separately: S becomes S + dt k (x - k S)."""
    v, low, k, q = _selection(parameters, x, ids, config)
    beta = oracles.sigmoid(oracles.linear(parameters["time_step"], low) + parameters["dt_bias"])
    starts = oracles.document_starts(ids, *x.shape[:2])
    y = parameters["D"] * v
    for b, d in np.ndindex(len(v), v.shape[2]):
        state = np.zeros(k.shape[-1])
        for t in range(v.shape[1]):
            if t == starts[b, t]:
                state = np.zeros(k.shape[-1])
            dt = beta[b, t, d] / (1 + beta[b, t, d] * k[b, t] @ k[b, t])
            state = state + dt * k[b, t] * (v[b, t, d] - k[b, t] * state)
            y[b, t, d] += q[b, t] @ state
    return _gated(parameters, x, y)


def _selection(parameters, x, ids, config):
    """x after its convolution, and the parts of its projection."""
    filters, rank = parameters["value_convolution"], len(parameters["time_step"]["kernel"])
    v = oracles.linear(parameters["value"], x)
    v = oracles.silu(
        oracles.causal_convolution(v, filters["convolution_kernel"], filters["convolution_bias"], ids=ids)[0]
    )
    selection = oracles.linear(parameters["selection"], v)
    states = (selection.shape[-1] - rank) // 2
    return v, selection[..., :rank], selection[..., rank : rank + states], selection[..., rank + states :]


def _gated(parameters, x, y):
    return oracles.linear(parameters["out"], y * oracles.silu(oracles.linear(parameters["gate"], x)))


def _run(a, u, ids):
    return oracles.linear_recurrence(a, u, ids=ids)[0]


def _complex(kernel):
    return kernel[0] + 1j * kernel[1]


ORACLES = {"gateloop": gateloop, "hgrn": hgrn, "longhorn": longhorn, "lru": lru, "mamba": mamba, "s5": s5}
