"""The mathematics of the layers: pure functions on arrays. Nothing here knows of Flax, meshes or configs."""

from jaxlinear.ops.attention import causal_attention
from jaxlinear.ops.convolution import causal_convolution
from jaxlinear.ops.delta_rule import delta_rule
from jaxlinear.ops.diagonal import linear_recurrence
from jaxlinear.ops.gated_rms_norm import gated_rms_norm
from jaxlinear.ops.linear_attention import linear_attention
from jaxlinear.ops.rg_lru import rg_lru
from jaxlinear.ops.rg_lru_gates import rg_lru_gates
from jaxlinear.ops.selective_scan import selective_scan
from jaxlinear.ops.short_convolution import short_convolution
from jaxlinear.ops.sliding_window import sliding_window_attention

# Names of what the backward passes of the operations need and would be expensive to recompute: see
# ``jax.ad_checkpoint.checkpoint_name``.
SAVED = ("recurrence", "attention", "grouped_product")

__all__ = [
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
