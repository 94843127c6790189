"""The operations on the mesh in use: those of ``jaxlinear.ops``, with the same names and contracts, for global arrays.

``on_mesh`` makes one of any ``Spec``. A kernel, which the compiler cannot split, runs on each device's part. Where the mesh
shards time, recurrences exchange their states (``parallel.sequence``), and windows and convolutions receive the positions
before their shard (``parallel.halos``). Otherwise they are the plain operations. Models call these, by this module's name;
softmax attention and what has the vocabulary's table are in modules of their own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import dtypes, heads
from jaxlinear.ops.convolution.op import CAUSAL_CONVOLUTION
from jaxlinear.ops.convolution.short import SHORT_CONVOLUTION
from jaxlinear.ops.delta_rule.op import DELTA_RULE
from jaxlinear.ops.diagonal.op import LINEAR_RECURRENCE
from jaxlinear.ops.gated_rms_norm import GATED_RMS_NORM
from jaxlinear.ops.linear_attention.op import LINEAR_ATTENTION
from jaxlinear.ops.rg_lru.gates import RG_LRU_GATES
from jaxlinear.ops.rg_lru.op import RG_LRU
from jaxlinear.ops.selective_scan.op import SELECTIVE_SCAN
from jaxlinear.parallel import sharding
from jaxlinear.parallel.attention import NO_DOCUMENT, Past, causal_attention, sliding_window_attention
from jaxlinear.parallel.on_mesh import on_mesh
from jaxlinear.parallel.sequence import document_starts, time_mesh
from jaxlinear.parallel.vocabulary import linear_cross_entropy, rows, token_losses

__all__ = [
    "NO_DOCUMENT",
    "Past",
    "causal_attention",
    "causal_convolution",
    "delta_rule",
    "document_starts",
    "gated_rms_norm",
    "linear_attention",
    "linear_cross_entropy",
    "linear_recurrence",
    "normalise_heads",
    "overlapping",
    "parameter_product",
    "rg_lru",
    "rg_lru_gates",
    "rows",
    "scale_heads",
    "selective_scan",
    "short_convolution",
    "sliding_window_attention",
    "token_losses",
]

causal_convolution = on_mesh(CAUSAL_CONVOLUTION)
delta_rule = on_mesh(DELTA_RULE)
gated_rms_norm = on_mesh(GATED_RMS_NORM)
linear_attention = on_mesh(LINEAR_ATTENTION)
linear_recurrence = on_mesh(LINEAR_RECURRENCE)
rg_lru = on_mesh(RG_LRU)
rg_lru_gates = on_mesh(RG_LRU_GATES)
selective_scan = on_mesh(SELECTIVE_SCAN)
short_convolution = on_mesh(SHORT_CONVOLUTION)


def normalise_heads(x: jax.Array, count: int, epsilon: float, **options: Any) -> jax.Array:
    """``ops.heads.normalise``."""
    return heads.normalise(x, count, epsilon, shards=sharding.shards("heads"), **options)


def scale_heads(x: jax.Array, scales: jax.Array) -> jax.Array:
    """``ops.heads.scale_heads``."""
    return heads.scale_heads(x, scales, shards=sharding.shards("heads"))


def overlapping(x: jax.Array, inputs: Any) -> jax.Array:
    """x ``[B, T, ...]``. Where time is sharded, whatever is computed from it waits for the ``inputs`` of a recurrence,
    arrays ``[B, T, ...]``, and so overlaps the exchange of states, which nothing would overlap otherwise."""
    return x if time_mesh("overlapping", x.shape[1]) is None else lax.optimization_barrier((x, inputs))[0]


def parameter_product(equation: str, x: jax.Array, parameter: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """``ops.dtypes.parameter_product``, whose gradient devices sum in the dtype that ``parallel.gradient_dtype`` names."""
    wide = sharding.choices_in_use().gradient_dtype == "float32"
    return dtypes.parameter_product(equation, x, parameter, dtype, wide_gradient=wide)
