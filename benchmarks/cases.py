"""The operations that the benchmarks measure: the shapes of their arguments, and values for these.

An operation is named as in ``jaxlinear.ops``; one with a log decay has its kind appended: ``delta_rule_scalar``.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlinear.ops.calls import Call

TAPS = 4


def case(
    name: str,
    batch: int,
    length: int,
    heads: int,
    key: int,
    value: int,
    *,
    dtype: str = "bfloat16",
    decay_dtype: str | None = None,  # of decays by channel; else as ``dtype``
    key_heads: int | None = None,
    documents: bool = False,
    **options: Any,
) -> Call:
    """The call of an operation. Those without keys have ``heads * value`` channels, the selective scan with ``key`` states
    each and the RG-LRU with a block of its gates for each head."""

    def wide(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, length, *shape), dtype)

    def narrow(*shape: int) -> jax.ShapeDtypeStruct:
        return wide(*shape, dtype="float32")

    def parameter(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, "float32")

    decays = {
        "_constant": parameter(heads),
        "_scalar": narrow(heads),
        "_channel": wide(heads, key, dtype=decay_dtype or dtype),
    }
    kind = next((kind for kind in decays if name.endswith(kind)), "")
    operation, channels = name.removesuffix(kind), heads * value
    x, states = wide(channels), narrow(key)
    kernel, bias = parameter(heads, value, value), parameter(channels)
    k = wide(key_heads or heads, key)
    attention = {"q": wide(heads, key), "k": k, "v": wide(key_heads or heads, value)}
    gates = {"recurrence_kernel": kernel, "recurrence_bias": bias, "input_kernel": kernel, "input_bias": bias}
    arrays = {
        "causal_attention": attention,
        "sliding_window_attention": attention,
        "linear_attention": {"q": k, "k": k, "v": wide(heads, value)},
        "delta_rule": {"q": k, "k": k, "v": wide(heads, value), "beta": narrow(heads)},
        "linear_recurrence": {"a": x, "x": x},
        "selective_scan": {"x": x, "dt": narrow(channels), "A": parameter(channels, key), "B": states, "C": states},
        "rg_lru": {"x": x, **gates, "rate": bias, "first": wide(dtype="bool")},
        "short_convolution": {"x": x, "kernel": parameter(TAPS, channels)},
        "gated_rms_norm": {"x": x, "gate": x, "scale": parameter(value)},
    }[operation]
    arrays |= {"log_decay": decays[kind]} if kind else {}
    arrays |= {"segment_ids": wide(dtype="int32")} if documents else {}
    return Call(operation, tuple((arrays | options).items()))


def values(call: Call, mean: float = -0.04) -> dict[str, jax.Array]:
    """Arrays for the call. Log decays are exponentially distributed with this mean, and keys have unit length; a document
    ends in the middle, if there are ``segment_ids``."""

    def draw(name: str, x: jax.ShapeDtypeStruct, random: jax.Array) -> jax.Array:
        match name:
            case "segment_ids":
                return jnp.broadcast_to(jnp.arange(x.shape[1]) >= x.shape[1] // 2, x.shape)
            case "first":
                starts = (0, x.shape[1] // 2) if "segment_ids" in call.arrays else (0,)
                return jnp.broadcast_to(jnp.isin(jnp.arange(x.shape[1]), jnp.array(starts)), x.shape)
            case "log_decay" | "rate":
                return mean * jax.random.exponential(random, x.shape)
            case "a":
                return jnp.exp(mean * jax.random.exponential(random, x.shape))
            case "dt":
                return -mean * jax.random.exponential(random, x.shape)
            case "A":
                return -jnp.broadcast_to(jnp.arange(1.0, x.shape[1] + 1), x.shape)
            case "beta":
                return jax.random.uniform(random, x.shape)
        drawn = jax.random.normal(random, x.shape)
        if name == "k":
            return drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
        return drawn * x.shape[-2] ** -0.5 if name.endswith("kernel") else drawn

    keys = jax.random.split(jax.random.key(0), len(call.arrays))
    return {
        name: draw(name, x, random).astype(x.dtype) for (name, x), random in zip(call.arrays.items(), keys, strict=True)
    }
