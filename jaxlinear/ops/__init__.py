"""The mathematics of the layers: pure functions on arrays. Nothing here knows of Flax, meshes or configs."""

from jaxlinear.ops.attention.op import CAUSAL_ATTENTION, causal_attention
from jaxlinear.ops.attention.sliding_window import SLIDING_WINDOW_ATTENTION, sliding_window_attention
from jaxlinear.ops.convolution.op import CAUSAL_CONVOLUTION, causal_convolution
from jaxlinear.ops.convolution.short import SHORT_CONVOLUTION, short_convolution
from jaxlinear.ops.delta_rule.op import DELTA_RULE, delta_rule
from jaxlinear.ops.diagonal.op import LINEAR_RECURRENCE, linear_recurrence
from jaxlinear.ops.gated_rms_norm import GATED_RMS_NORM, gated_rms_norm
from jaxlinear.ops.linear_attention.op import LINEAR_ATTENTION, linear_attention
from jaxlinear.ops.rg_lru.gates import RG_LRU_GATES, rg_lru_gates
from jaxlinear.ops.rg_lru.op import RG_LRU, rg_lru
from jaxlinear.ops.selective_scan.op import SELECTIVE_SCAN, selective_scan

# What each operation publishes of itself, by its name.
SPECS = {
    spec.name: spec
    for spec in (
        CAUSAL_ATTENTION,
        CAUSAL_CONVOLUTION,
        DELTA_RULE,
        GATED_RMS_NORM,
        LINEAR_ATTENTION,
        LINEAR_RECURRENCE,
        RG_LRU,
        RG_LRU_GATES,
        SELECTIVE_SCAN,
        SHORT_CONVOLUTION,
        SLIDING_WINDOW_ATTENTION,
    )
}

# Names of what the backward passes of the operations need and would be expensive to recompute: see
# ``jax.ad_checkpoint.checkpoint_name``.
SAVED = ("recurrence", "attention", "grouped_product")

__all__ = [
    "SAVED",
    "SPECS",
    "causal_attention",
    "causal_convolution",
    "delta_rule",
    "gated_rms_norm",
    "linear_attention",
    "linear_recurrence",
    "rg_lru",
    "rg_lru_gates",
    "selective_scan",
    "short_convolution",
    "sliding_window_attention",
]
