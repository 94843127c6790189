"""The mathematics of the layers: pure functions on arrays. Nothing here knows of Flax, meshes or configs."""

from jaxlinear.ops.convolution import causal_convolution
from jaxlinear.ops.diagonal import linear_recurrence
from jaxlinear.ops.sliding_window import sliding_window_attention

# Names of what the backward passes of the operations need and would be dear to compute again: see
# ``jax.ad_checkpoint.checkpoint_name``.
SAVED = ("recurrence", "attention")

__all__ = ["causal_convolution", "linear_recurrence", "sliding_window_attention"]
