"""The operations and layers reimplemented from their equations, step by step in NumPy: slow, plain, float64.

A document is a run of equal segment ids. Axes: B batch, T time, H heads, G key heads, K key, V value, D model,
R recurrent. ``parameters`` is the pure dict of a module.
"""

import numpy as np

from jaxlinear.models import stacks


def document_starts(ids, batch, length):
    """``[B, T]`` int: the position in its row at which each token's document begins."""
    starts = np.zeros((batch, length), int)
    for b in range(batch):
        for t in range(1, length):
            starts[b, t] = t if ids is not None and ids[b, t] != ids[b, t - 1] else starts[b, t - 1]
    return starts


def linear_recurrence(a, x, initial_state=None, ids=None, reverse=False):
    """``h_t = a_t h_{t-1} + x_t`` (``h_{t+1}`` if reverse); a ``[B, T, ...]`` or ``[...]``. -> h, the last h."""
    batch, length = x.shape[:2]
    a = np.broadcast_to(a, x.shape)
    order = range(length)[::-1] if reverse else range(length)
    h = np.zeros(x.shape, np.result_type(a, x, np.float64))
    final = np.zeros((batch, *x.shape[2:]), h.dtype)
    for b in range(batch):
        state = np.zeros(x.shape[2:]) if initial_state is None else initial_state[b]
        before = None
        for t in order:
            if before is not None and ids is not None and ids[b, t] != ids[b, before]:
                state = np.zeros(x.shape[2:])
            state = h[b, t] = a[b, t] * state + x[b, t]
            before = t
        final[b] = state
    return h, final


def linear_attention(q, k, v, log_decay=None, initial_state=None, ids=None, scale=None):
    """``S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T``, ``o_t = scale S_t^T q_t``, one head of one token at a time.

    q, k ``[B, T, H, K]``; v ``[B, T, H, V]``; log_decay None, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``. -> o, the last S.
    """
    (batch, length, heads, width), value_width = q.shape, v.shape[-1]
    scale = 1 / np.sqrt(width) if scale is None else scale
    log_decay = np.zeros(heads) if log_decay is None else log_decay
    if log_decay.ndim < 4:
        log_decay = log_decay[..., None]
    log_decay = np.broadcast_to(log_decay, q.shape)
    o, final = np.zeros((batch, length, heads, value_width)), np.zeros((batch, heads, width, value_width))
    for b, h in np.ndindex(batch, heads):
        state = np.zeros((width, value_width)) if initial_state is None else initial_state[b, h]
        for t in range(length):
            if t > 0 and ids is not None and ids[b, t] != ids[b, t - 1]:
                state = np.zeros((width, value_width))
            state = np.diag(np.exp(log_decay[b, t, h])) @ state + np.outer(k[b, t, h], v[b, t, h])
            o[b, t, h] = scale * state.T @ q[b, t, h]
        final[b, h] = state
    return o, final


def delta_rule(q, k, v, beta, log_decay=None, initial_state=None, ids=None, scale=None):
    """``S' = diag(exp(log_decay_t)) S_{t-1}``, ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T``, ``o_t = scale S_t^T q_t``.

    q, k ``[B, T, H, K]``; v ``[B, T, H, V]``; beta ``[B, T, H]``; log_decay None, ``[B, T, H]`` or ``[B, T, H, K]``.
    -> o, the last S.
    """
    (batch, length, heads, width), value_width = q.shape, v.shape[-1]
    scale = 1 / np.sqrt(width) if scale is None else scale
    log_decay = np.zeros(beta.shape) if log_decay is None else log_decay
    log_decay = np.broadcast_to(log_decay if log_decay.ndim == 4 else log_decay[..., None], q.shape)
    o, final = np.zeros((batch, length, heads, value_width)), np.zeros((batch, heads, width, value_width))
    for b, h in np.ndindex(batch, heads):
        state = np.zeros((width, value_width)) if initial_state is None else initial_state[b, h]
        for t in range(length):
            if t > 0 and ids is not None and ids[b, t] != ids[b, t - 1]:
                state = np.zeros((width, value_width))
            state = np.diag(np.exp(log_decay[b, t, h])) @ state
            held = state.T @ k[b, t, h]
            state = state + beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h] - held)
            o[b, t, h] = scale * state.T @ q[b, t, h]
        final[b, h] = state
    return o, final


def selective_scan(x, dt, A, B, C, initial_state=None, ids=None):
    """``S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T``, ``y_t = S_t C_t``.

    If A is None, ``1 - dt_t (B_t^T)^2`` replaces the exponential.
    x, dt ``[B, T, D]``; A ``[D, N]``; B, C ``[B, T, N]``. -> y, the last S.
    """
    (batch, length, width), states = x.shape, B.shape[-1]
    y, final = np.zeros((batch, length, width)), np.zeros((batch, width, states))
    for b, d, n in np.ndindex(batch, width, states):
        state = 0.0 if initial_state is None else initial_state[b, d, n]
        for t in range(length):
            if t > 0 and ids is not None and ids[b, t] != ids[b, t - 1]:
                state = 0.0
            kept = 1 - dt[b, t, d] * B[b, t, n] ** 2 if A is None else np.exp(dt[b, t, d] * A[d, n])
            state = kept * state + dt[b, t, d] * x[b, t, d] * B[b, t, n]
            y[b, t, d] += C[b, t, n] * state
        final[b, d, n] = state
    return y, final


def causal_convolution(x, kernel, bias=None, state=None, ids=None):
    """``y_t = bias + sum_j kernel[width-1-j] x_{t-j}``. -> y, the last width-1 inputs of the last document."""
    (batch, length, channels), width = x.shape, len(kernel)
    starts = document_starts(ids, batch, length)

    def look(b, t, back):
        """x[b, t - back] if t's document has it; else an entry of the state, or zeros."""
        place = t - back
        if place >= starts[b, t]:
            return x[b, place]
        if starts[b, t] > 0 or state is None or place < -(width - 1):
            return np.zeros(channels)
        return state[b, width - 1 + place]

    y, final = np.zeros(x.shape), np.zeros((batch, width - 1, channels))
    for b in range(batch):
        for t in range(length):
            y[b, t] = 0 if bias is None else bias
            for back in range(width):
                y[b, t] += kernel[width - 1 - back] * look(b, t, back)
        for back in range(width - 1):
            final[b, width - 2 - back] = look(b, length - 1, back)
    return y, final


def sliding_window_attention(q, k, v, *, window, scale=None, ids=None):
    """One head of one token at a time. q ``[B, T, H, K]``; k, v ``[B, P+T, G, ...]``; ids ``[B, P+T]``."""
    batch, length, heads, width = q.shape
    prefix, repeats = k.shape[1] - length, heads // k.shape[2]
    scale = width**-0.5 if scale is None else scale
    starts = document_starts(ids, batch, prefix + length)
    o = np.zeros((batch, length, heads, v.shape[-1]))
    for b in range(batch):
        for t in range(length):
            present = prefix + t
            seen = range(max(starts[b, present], present - window + 1), present + 1)
            for h in range(heads):
                logits = np.array([scale * np.dot(q[b, t, h], k[b, s, h // repeats]) for s in seen])
                weights = np.exp(logits - logits.max())
                weights = weights / weights.sum()
                for s, weight in zip(seen, weights, strict=True):
                    o[b, t, h] += weight * v[b, s, h // repeats]
    return o


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def linear_cross_entropy(x, embedding, targets, weights, *, soft_cap=0.0, z_loss=0.0):
    """-> weighted nll, weighted nll + z_loss log_z^2, and the nll of each token ``[B, T]``."""
    losses, nll, objective = np.zeros(targets.shape), 0.0, 0.0
    for b, t in np.ndindex(*targets.shape):
        logits = embedding @ x[b, t]
        if soft_cap:
            logits = soft_cap * np.tanh(logits / soft_cap)
        losses[b, t] = -log_softmax(logits)[targets[b, t]]
        log_z = logits[0] - log_softmax(logits)[0]
        nll += weights[b, t] * losses[b, t]
        objective += weights[b, t] * (losses[b, t] + z_loss * log_z**2)
    return nll, objective, losses


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def gelu(x):
    """The tanh form (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(parameters, x):
    y = x @ parameters["kernel"]
    return y + parameters["bias"] if "bias" in parameters else y


def rms_norm(parameters, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * (1 + parameters["scale"])


def gated_mlp(parameters, x):
    inner = gelu(linear(parameters["gate"], x)) * linear(parameters["up"], x)
    return linear(parameters["down"], inner)


def silu(x):
    return x * sigmoid(x)


def mixture_of_experts(parameters, x, experts_per_token, *, activation=gelu, counted=None):
    """Token by token, expert by expert. -> y, and the losses over the ``counted`` ``[B, T]`` tokens, or over all."""
    batch, length, _ = x.shape
    experts = parameters["router"].shape[1]
    counted = np.ones((batch, length), bool) if counted is None else counted
    y, choices, probabilities, squares = np.zeros(x.shape), np.zeros(experts), np.zeros(experts), 0.0
    for b, t in np.ndindex(batch, length):
        logits = x[b, t] @ parameters["router"]
        probability = np.exp(log_softmax(logits))
        chosen = np.argsort(-logits, kind="stable")[:experts_per_token]
        total = probability[chosen].sum() if experts_per_token > 1 else 1.0
        for e in chosen:
            inner = activation(_expert(parameters, "gate", e, x[b, t])) * _expert(parameters, "up", e, x[b, t])
            y[b, t] += probability[e] / total * _expert(parameters, "down", e, inner)
        if counted[b, t]:
            choices[chosen] += 1 / (experts_per_token * counted.sum())
            probabilities += probability / counted.sum()
            squares += (logits - np.log(probability))[0] ** 2 / counted.sum()
    return y, {"load_balance": experts * np.sum(choices * probabilities), "router_z": squares}


def _expert(parameters, name, e, x):
    y = x @ parameters[f"{name}_kernel"][e]
    return y + parameters[f"{name}_bias"][e] if f"{name}_bias" in parameters else y


def rotary(x, positions, *, fraction, base=10_000.0, scaling=0.0, context=8192):
    """Channel pairs (i, i + half) rotated as complex numbers; x ``[B, T, H, K]``, positions ``[B, T]``. ``scaling`` slows
    pairs whose wave is longer than the context by that factor, and leaves those of a quarter of it or less unchanged."""
    half = int(x.shape[-1] * fraction) // 2
    y = np.array(x, np.float64)
    for i in range(half):
        frequency = base ** (-i / half)
        wave = 2 * np.pi / frequency
        if scaling and wave > context:
            frequency /= scaling
        elif scaling and wave > context / 4:
            smooth = (context / wave - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / scaling + smooth * frequency
        turned = (x[..., i] + 1j * x[..., i + half]) * np.exp(1j * positions * frequency)[..., None]
        y[..., i], y[..., i + half] = turned.real, turned.imag
    return y


def turned(x, positions, config):
    """``rotary`` with the keys of a model's config."""
    scaled = {"scaling": config.rotary_scaling, "context": config.rotary_context}
    return rotary(x, positions, fraction=config.rotary_fraction, base=config.rotary_base, **scaled)


def rg_lru(parameters, x, ids=None):
    """From an empty past: x ``[B, T, R]`` -> h, the last h (De et al., arXiv:2402.19427, section 2.4)."""
    batch, length, _ = x.shape
    heads, block, _ = parameters["input_kernel"].shape
    starts = document_starts(ids, batch, length)
    h, state = np.zeros(x.shape), np.zeros((batch, x.shape[-1]))
    for b in range(batch):
        for t in range(length):
            parts = x[b, t].reshape(heads, block)
            gates = []
            for name in ("recurrence", "input"):
                product = [parts[i] @ parameters[f"{name}_kernel"][i] for i in range(heads)]
                gates.append(sigmoid(np.concatenate(product) + parameters[f"{name}_bias"]))
            a = np.exp(-8 * softplus(parameters["decay"]) * gates[0])
            u = gates[1] * x[b, t]
            if t == starts[b, t]:
                state[b] = u
            else:
                state[b] = a * state[b] + np.sqrt(1 - a**2) * u
            h[b, t] = state[b]
    return h, state


def language_model(config, parameters, tokens, ids=None, *, mixers):
    """Logits ``[B, T, vocab]`` from an empty past, block by block; ``mixers`` holds each mixer's oracle."""
    x = parameters["embedding"][tokens] * (np.sqrt(config.width) if config.embedding_scale else 1.0)
    for layer, mixer in enumerate(config.layers):
        place = stacks.place(config.stacks, layer)
        block = _take(parameters["stacks"][place.stack]["blocks"][place.block], place.repeat)
        x = x + mixers[mixer](block["mixer"], rms_norm(block["mixer_norm"], x), ids, config)
        x = x + gated_mlp(block["mlp"], rms_norm(block["mlp_norm"], x))
    logits = rms_norm(parameters["norm"], x) @ parameters["embedding"].T
    return config.logit_soft_cap * np.tanh(logits / config.logit_soft_cap) if config.logit_soft_cap else logits


def _take(tree, index):
    return {key: _take(value, index) if isinstance(value, dict) else value[index] for key, value in tree.items()}
