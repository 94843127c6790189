"""The two mixers of Griffin (De et al., arXiv:2402.19427)."""

import numpy as np

from tests import oracles


def rg_lru(parameters, x, ids, config):
    gate = oracles.gelu(oracles.linear(parameters["gate"], x))
    inner = oracles.linear(parameters["input"], x)
    kernel, bias = parameters["convolution_kernel"], parameters["convolution_bias"]
    inner, _ = oracles.causal_convolution(inner, kernel, bias, ids=ids)
    return oracles.linear(parameters["out"], gate * oracles.rg_lru(parameters["rg_lru"], inner, ids)[0])


def sliding_window(parameters, x, ids, config):
    """Positions count from each document's first token."""
    batch, length, _ = x.shape
    positions = np.arange(length)[None] - oracles.document_starts(ids, batch, length)
    q = oracles.linear(parameters["query"], x).reshape(batch, length, config.num_heads, -1)
    k, v = (
        oracles.linear(parameters[name], x).reshape(batch, length, config.key_value_heads, -1)
        for name in ("key", "value")
    )
    q, k = (oracles.turned(y, positions, config) for y in (q, k))
    o = oracles.sliding_window_attention(q, k, v, window=config.window, ids=ids)
    return oracles.linear(parameters["out"], o.reshape(batch, length, -1))


ORACLES = {"rg_lru": rg_lru, "sliding_window": sliding_window}
