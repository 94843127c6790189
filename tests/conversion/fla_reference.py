"""Language models of flash-linear-attention (github.com/fla-org/flash-linear-attention) in NumPy and float64: the equations
of their papers, token by token, with that package's field and tensor names.

``fla_check.py`` compares them with the package itself, which needs Triton, so that check is not among the tests.
"""

import numpy as np

VOCABULARY, LENGTH = 61, 21
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))
_SHARED = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3}
_WINDOWS = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": 5, "rope_theta": 500.0}
_FULL = {"layers": [0, 2], "num_heads": 2, "num_kv_heads": 2, "qkv_bias": False, "window_size": None, "rope_theta": 1e4}
MODELS = {
    "gla": dict(num_heads=2),
    "gla, tied, other widths": dict(
        **dict(num_heads=4, expand_k=0.75, expand_v=2.0, fuse_norm=False, norm_eps=1e-2, tie_word_embeddings=True),
        **dict(intermediate_size=None, hidden_ratio=2),
    ),
    "gla, with windows": dict(num_heads=2, attn=_WINDOWS),
    "gla, with full attention": dict(num_heads=4, attn=_FULL),
    "gated_deltanet": dict(num_heads=3, head_dim=12),
    "gated_deltanet, with windows": dict(
        num_heads=3, head_dim=8, expand_v=0.75, conv_size=3, norm_eps=1e-2, attn=_WINDOWS
    ),
    "delta_net": dict(num_heads=2),
    "delta_net, with full attention": dict(
        num_heads=4, expand_k=0.5, expand_v=0.75, conv_size=3, norm_eps=1e-2, attn=_FULL
    ),
    "delta_net, with a gate": dict(num_heads=2, expand_v=0.75, norm_eps=1e-2, use_gate=True, attn=_WINDOWS),
    "delta_net, negative eigenvalues": dict(num_heads=4, allow_neg_eigval=True),
    "gated_deltanet, negative eigenvalues": dict(num_heads=2, head_dim=8, allow_neg_eigval=True),
    "gated_deltanet, without a gate": dict(  # which has an activation all the same
        num_heads=2, head_dim=8, norm_eps=1e-2, use_gate=False, output_gate_activation="sigmoid"
    ),
    "gated_deltaproduct": dict(
        num_heads=3, head_dim=8, expand_v=0.75, num_householder=2, use_forget_gate=True, allow_neg_eigval=True
    ),
    "gated_deltaproduct, without gates": dict(
        num_heads=2, head_dim=12, conv_size=3, norm_eps=1e-2, num_householder=3, use_output_gate=False
    ),
    "gated_deltaproduct, with its output's gate": dict(num_heads=2, head_dim=12, num_householder=2),
    "gated_deltaproduct, with its decay": dict(
        **dict(num_heads=3, head_dim=8, expand_v=0.75, norm_eps=1e-2, num_householder=2),
        **dict(use_forget_gate=True, use_output_gate=False),
    ),
    "gated_deltaproduct, of one update": dict(num_heads=2, head_dim=12),
    "kda": dict(num_heads=2, head_dim=12),
    "kda, with windows": dict(
        **dict(num_heads=3, head_dim=8, expand_v=0.75, conv_size=3, norm_eps=1e-2, allow_neg_eigval=True, attn=_WINDOWS)
    ),
    "retnet": dict(num_heads=2),
    "retnet, with windows": dict(
        **dict(num_heads=4, expand_k=0.5, expand_v=0.75, fuse_norm=False, norm_eps=1e-2),
        attn=_WINDOWS | {"rope_theta": 1e4},
    ),
    "hgrn": {},
    "hgrn, wider": dict(expand_ratio=1.5, norm_eps=1e-2, tie_word_embeddings=True),
    "hgrn2": dict(expand_ratio=16),
    "hgrn2, by heads": dict(expand_ratio=None, num_heads=4, norm_eps=1e-2),
    "transformer": dict(num_heads=4),
    "transformer, grouped": dict(num_heads=4, num_kv_heads=2, rope_theta=500.0, norm_eps=1e-2),
    "transformer, with windows": dict(num_heads=4, num_kv_heads=1, window_size=5),
}
MODELS = {name: _SHARED | {"model_type": name.partition(",")[0]} | fields for name, fields in MODELS.items()}


def shapes(fields):
    """The shapes of the tensors, by name."""
    width, inner, found = fields["hidden_size"], _inner(fields), {}
    found["model.embeddings.weight"] = found["lm_head.weight"] = (fields["vocab_size"], width)
    if fields.get("tie_word_embeddings"):
        del found["lm_head.weight"]
    found["model.norm.weight"] = (width,)
    if fields["model_type"] in _BOUNDED:
        found["model.lower_bounds"] = (fields["num_hidden_layers"], _BOUNDED[fields["model_type"]](fields))
    for layer in range(fields["num_hidden_layers"]):
        there = f"model.layers.{layer}"
        found[f"{there}.attn_norm.weight"] = found[f"{there}.mlp_norm.weight"] = (width,)
        found[f"{there}.mlp.gate_proj.weight"] = found[f"{there}.mlp.up_proj.weight"] = (inner, width)
        found[f"{there}.mlp.down_proj.weight"] = (width, inner)
        spec = _attention_of(fields, layer)
        own = _attention_shapes(width, spec) if spec else _MIXERS[fields["model_type"]][0](fields)
        found |= {f"{there}.attn.{name}": shape for name, shape in own.items()}
    return found


def draw(fields, seed=0):
    """Float32 tensors by name, drawn so that every gate, bias and scale matters."""
    random = np.random.default_rng(seed)
    drawn = {}
    for name, shape in sorted(shapes(fields).items()):
        noise = random.standard_normal(shape)
        if len(shape) > 1:
            drawn[name] = noise * shape[-1] ** -0.5
        else:
            drawn[name] = 0.3 * noise + ("norm" in name)
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def logits(fields, tensors, tokens):
    """``[B, T, vocab]``."""
    tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
    x, epsilon = tensors["model.embeddings.weight"][tokens], fields.get("norm_eps", 1e-6)
    for layer in range(fields["num_hidden_layers"]):
        there = f"model.layers.{layer}."
        block = {name.removeprefix(there): y for name, y in tensors.items() if name.startswith(there)}
        own = {name.removeprefix("attn."): y for name, y in block.items() if name.startswith("attn.")}
        if fields["model_type"] in _BOUNDED:
            own["lower_bound"] = _lower_bounds(tensors["model.lower_bounds"])[layer]
        y, spec = _rms(x, block["attn_norm.weight"], epsilon), _attention_of(fields, layer)
        x = x + (_attention(spec, own, y) if spec else _MIXERS[fields["model_type"]][1](fields, own, y))
        y = _rms(x, block["mlp_norm.weight"], epsilon)
        inner = _silu(y @ block["mlp.gate_proj.weight"].T) * (y @ block["mlp.up_proj.weight"].T)
        x = x + inner @ block["mlp.down_proj.weight"].T
    head = tensors["model.embeddings.weight" if fields.get("tie_word_embeddings") else "lm_head.weight"]
    return _rms(x, tensors["model.norm.weight"], epsilon) @ head.T


def _inner(fields):
    """The MLP's width: as given, or two thirds of the ratio, rounded up to a multiple of 256."""
    given = fields.get("intermediate_size")
    return given or -(int(fields["hidden_size"] * fields["hidden_ratio"] * 2 / 3) // -256) * 256


# Softmax attention, over the whole past or a window.


def _attention_of(fields, layer):
    spec = fields.get("attn")
    if fields["model_type"] == "transformer":
        whole = {"num_kv_heads": fields["num_heads"], "window_size": None, "rope_theta": 1e4, "layers": [layer]}
        spec = whole | fields
    return spec if spec and layer in spec["layers"] else None


def _attention_shapes(width, spec):
    shared = width // spec["num_heads"] * spec["num_kv_heads"]
    return {f"{name}_proj.weight": (shared if name in "kv" else width, width) for name in "qkvo"}


def _attention(spec, w, x):
    length, width = x.shape[1:]
    head, sharing = width // spec["num_heads"], spec["num_heads"] // spec["num_kv_heads"]
    q, k, v = (_heads(x @ w[f"{name}_proj.weight"].T, head) for name in "qkv")
    q, k = _turned(q, spec["rope_theta"]), _turned(k, spec["rope_theta"])
    k, v = (np.repeat(y, sharing, axis=2) for y in (k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) / head**0.5
    age = np.arange(length)[:, None] - np.arange(length)[None]
    seen = (age >= 0) & (age < (spec["window_size"] or length))
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    o = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
    return o.reshape(x.shape) @ w["o_proj.weight"].T


def _turned(x, base):
    """Rotates channel i of a head's first half with channel i of its second half, by the position."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# Gated linear attention.


def _gla_norm(fields):
    return "g_norm_swish_gate.weight" if fields.get("fuse_norm", True) else "g_norm.weight"


def _gla_shapes(fields):
    width, heads = fields["hidden_size"], fields["num_heads"]
    keys, values = (int(width * fields.get(name, default)) for name, default in (("expand_k", 0.5), ("expand_v", 1)))
    decay = {"gk_proj.0.weight": (16, width), "gk_proj.1.weight": (keys, 16), "gk_proj.1.bias": (keys,)}
    return _projections(width, keys, values) | decay | {_gla_norm(fields): (values // heads,)}


def _projections(width, keys, values):
    outputs = {"q": keys, "k": keys, "v": values, "g": values}
    own = {f"{name}_proj.weight": (channels, width) for name, channels in outputs.items()}
    return own | {"o_proj.weight": (width, values)}


def _gla(fields, w, x):
    decay = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    keys, values = (len(w[f"{name}_proj.weight"]) // fields["num_heads"] for name in "qv")
    q, k = (_heads(x @ w[f"{name}_proj.weight"].T, keys) for name in "qk")
    v, gate = (_heads(x @ w[f"{name}_proj.weight"].T, values) for name in "vg")
    o = _gated(q, k, v, _heads(_sigmoid(decay) ** (1 / 16), keys))
    o = _rms(o, w[_gla_norm(fields)], fields.get("norm_eps", 1e-6)) * _silu(gate)
    return o.reshape(*x.shape[:2], -1) @ w["o_proj.weight"].T


def _gated(q, k, v, decay):
    """Linear attention with a decay for each key channel."""
    state, o = np.zeros((len(q), *k.shape[2:], v.shape[-1])), np.empty_like(v)
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        o[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t]) * k.shape[-1] ** -0.5
    return o


# RetNet, whose decays are constant.


def _retnet_shapes(fields):
    width, heads = fields["hidden_size"], fields["num_heads"]
    keys, values = (int(width * fields.get(name, default)) for name, default in (("expand_k", 1), ("expand_v", 2)))
    return _projections(width, keys, values) | {_gla_norm(fields): (values // heads,)}


def _retnet(fields, w, x):
    heads = fields["num_heads"]
    q, k, v, gate = (_heads(y, y.shape[-1] // heads) for y in (x @ w[f"{name}_proj.weight"].T for name in "qkvg"))
    decay = np.broadcast_to((1 - 2.0 ** (-5 - np.arange(heads)))[:, None], k.shape)
    o = _gated(_turned(q, 1e4), _turned(k, 1e4), v, decay)
    o = _rms(o, w[_gla_norm(fields)], fields.get("norm_eps", 1e-6)) * _silu(gate)
    return o.reshape(*x.shape[:2], -1) @ w["o_proj.weight"].T


# HGRN and HGRN2, whose gates have lower bounds that rise with depth.


def _hgrn_width(fields):
    return int(fields["hidden_size"] * fields.get("expand_ratio", 1))


def _hgrn_shapes(fields):
    width, inner = fields["hidden_size"], _hgrn_width(fields)
    own = {f"{name}_proj.weight": (inner, width) for name in "ifg"}
    return own | {"g_norm.weight": (inner,), "o_proj.weight": (width, inner)}


def _hgrn(fields, w, x):
    inner, forget, gate = (x @ w[f"{name}_proj.weight"].T for name in "ifg")
    forget = w["lower_bound"] + (1 - w["lower_bound"]) * _sigmoid(forget)
    h, o = np.zeros_like(inner[:, 0]), np.empty_like(inner)
    for t in range(x.shape[1]):
        h = o[:, t] = forget[:, t] * h + (1 - forget[:, t]) * _silu(inner[:, t])
    return (_rms(o, w["g_norm.weight"], fields.get("norm_eps", 1e-6)) * _silu(gate)) @ w["o_proj.weight"].T


def _hgrn2_shapes(fields):
    width = fields["hidden_size"]
    return {f"{name}_proj.weight": (width, width) for name in "qfio"} | {"g_norm.weight": (width,)}


def _hgrn2(fields, w, x):
    head = fields["expand_ratio"] or x.shape[-1] // fields["num_heads"]
    q, v = (_heads(y, head) for y in (_silu(x @ w["q_proj.weight"].T), x @ w["i_proj.weight"].T))
    forget = w["lower_bound"] + (1 - w["lower_bound"]) * _sigmoid(x @ w["f_proj.weight"].T)
    forget = _heads(forget, head)
    o = _gated(q, 1 - forget, v, forget).reshape(x.shape)
    return _rms(o, w["g_norm.weight"], 1e-5) @ w["o_proj.weight"].T  # regardless of norm_eps


def _lower_bounds(weights):
    """``[L, D]``: 0 in the first layer."""
    shares = np.exp(weights) / np.exp(weights).sum(0)
    return np.cumsum(shares, axis=0) - shares[0]


# The delta rule, with and without a decay.


def _delta_shapes(fields, heads, keys, values):
    width, taps, updates = fields["hidden_size"], fields.get("conv_size", 4), fields.get("num_householder", 1)
    channels = {"q": keys, "k": updates * keys, "v": updates * values}
    own = {f"{name}_proj.weight": (size, width) for name, size in {**channels, "b": updates * heads}.items()}
    own |= {f"{name}_conv1d.weight": (size, 1, taps) for name, size in channels.items()}
    return own | {"o_norm.weight": (values // heads,), "o_proj.weight": (width, values)}


def _delta_rule(fields, w, x, decay=1.0):
    """``[B, T, H, V]``; the decay, if any, is ``[B, T, H, 1 or K, 1]``. A token's updates are consecutive: all heads of the
    first update come first."""
    heads, updates = fields["num_heads"], fields.get("num_householder", 1)
    q, k, v = (_silu(_convolved(x @ w[f"{name}_proj.weight"].T, w[f"{name}_conv1d.weight"])) for name in "qkv")
    q, k, v = (y.reshape(*x.shape[:2], n, heads, -1) for y, n in ((q, 1), (k, updates), (v, updates)))
    q, k = (y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True) + 1e-6) for y in (q[:, :, 0], k))
    beta = _sigmoid(x @ w["b_proj.weight"].T) * (2 if fields.get("allow_neg_eigval") else 1)
    beta = beta.reshape(*x.shape[:2], updates, heads)
    decay = np.broadcast_to(decay, (*q.shape, 1))
    state, o = np.zeros((len(x), heads, k.shape[-1], v.shape[-1])), np.empty_like(v[:, :, 0])
    for t in range(x.shape[1]):
        state = decay[:, t] * state
        for i in range(updates):
            error = v[:, t, i] - np.einsum("bhkv,bhk->bhv", state, k[:, t, i])
            state = state + np.einsum("bh,bhk,bhv->bhkv", beta[:, t, i], k[:, t, i], error)
        o[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t]) * k.shape[-1] ** -0.5
    return _rms(o, w["o_norm.weight"], fields.get("norm_eps", 1e-6))


def _convolved(x, kernel):
    """Filters each channel by its taps, the last of which is the present token's."""
    taps = kernel.shape[-1]
    padded = np.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    return sum(padded[:, i : i + x.shape[1]] * kernel[:, 0, i] for i in range(taps))


def _has_gate(fields):
    kind = fields["model_type"]
    return fields.get("use_output_gate" if kind == "gated_deltaproduct" else "use_gate", kind != "delta_net")


def _gate_shapes(fields, values):
    return {"g_proj.weight": (values, fields["hidden_size"])} if _has_gate(fields) else {}


def _delta_output(fields, w, x, o):
    gate = _silu(x @ w["g_proj.weight"].T) if _has_gate(fields) else 1
    return (o.reshape(*x.shape[:2], -1) * gate) @ w["o_proj.weight"].T


def _delta_net_shapes(fields):
    keys, values = (int(fields["hidden_size"] * fields.get(name, 1)) for name in ("expand_k", "expand_v"))
    return _delta_shapes(fields, fields["num_heads"], keys, values) | _gate_shapes(fields, values)


def _delta_net(fields, w, x):
    return _delta_output(fields, w, x, _delta_rule(fields, w, x))


def _gated_deltanet_shapes(fields):
    width, heads, head = fields["hidden_size"], fields["num_heads"], fields["head_dim"]
    values = heads * int(head * fields.get("expand_v", 2))
    own = {"a_proj.weight": (heads, width), "A_log": (heads,), "dt_bias": (heads,)} | _gate_shapes(fields, values)
    return _delta_shapes(fields, heads, heads * head, values) | own


def _gated_deltanet(fields, w, x):
    rate = np.exp(w["A_log"]) * np.log1p(np.exp(x @ w["a_proj.weight"].T + w["dt_bias"]))
    return _delta_output(fields, w, x, _delta_rule(fields, w, x, np.exp(-rate)[..., None, None]))


def _gated_deltaproduct_shapes(fields):
    found = _gated_deltanet_shapes(fields)
    unread = () if fields.get("use_forget_gate") else ("a_proj.weight", "A_log", "dt_bias")
    return {name: shape for name, shape in found.items() if name not in unread}


def _gated_deltaproduct(fields, w, x):
    """Gated DeltaNet or, without its decay, DeltaNet."""
    return (_gated_deltanet if fields.get("use_forget_gate") else _delta_net)(fields, w, x)


def _kda_shapes(fields):
    width, heads, head = fields["hidden_size"], fields["num_heads"], fields["head_dim"]
    value = int(head * fields.get("expand_v", 1))
    keys, values = heads * head, heads * value
    own = {"f_proj.0.weight": (value, width), "f_proj.1.weight": (keys, value), "A_log": (heads,), "dt_bias": (keys,)}
    gate = {"g_proj.0.weight": (value, width), "g_proj.1.weight": (values, value), "g_proj.1.bias": (values,)}
    return _delta_shapes(fields, heads, keys, values) | own | gate


def _kda(fields, w, x):
    decay = x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]
    rate = np.exp(w["A_log"])[:, None] * np.log1p(np.exp(_heads(decay, fields["head_dim"])))
    o = _delta_rule(fields, w, x, np.exp(-rate)[..., None])
    gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    return (o.reshape(*x.shape[:2], -1) * _sigmoid(gate)) @ w["o_proj.weight"].T


_MIXERS = {
    "gla": (_gla_shapes, _gla),
    "gated_deltanet": (_gated_deltanet_shapes, _gated_deltanet),
    "gated_deltaproduct": (_gated_deltaproduct_shapes, _gated_deltaproduct),
    "delta_net": (_delta_net_shapes, _delta_net),
    "hgrn": (_hgrn_shapes, _hgrn),
    "hgrn2": (_hgrn2_shapes, _hgrn2),
    "kda": (_kda_shapes, _kda),
    "retnet": (_retnet_shapes, _retnet),
}
# How many channels have lower bounds.
_BOUNDED = {"hgrn": _hgrn_width, "hgrn2": lambda fields: fields["hidden_size"]}


def _heads(x, width):
    return x.reshape(*x.shape[:2], -1, width)


def _rms(x, weight, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _sigmoid(x)
