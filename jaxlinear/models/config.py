"""The definition of a model: the numbers that determine its shapes and its arithmetic."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxlinear.models.stacks import Stack, split


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every field is a key of the ``model`` section of a config, where its meaning is documented (``config.py``)."""

    pattern: tuple[str, ...]
    num_layers: int
    vocab_size: int
    width: int
    recurrent_width: int
    num_heads: int
    window: int = 1024
    key_value_heads: int = 1
    context: int = 4096
    recurrent_heads: int = 0
    key_width: int = 0
    value_width: int = 0
    time_step_rank: int = 0
    feature_map: str = "identity"
    discretization: str = "zero_order_hold"
    head_norm: str = "group"
    selection_norm: bool = False
    output_gate: str = "auto"
    gate_bias: bool = False
    negative_eigenvalues: bool = False
    householders: int = 1
    channel_mixer: str = "gated_mlp"
    mlp_expansion: float = 3.0
    mlp_activation: str = "gelu"
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    bias: bool = True
    convolution_width: int = 4
    rotary_fraction: float = 0.5
    rotary_base: float = 10_000.0
    rotary_scaling: float = 0.0
    rotary_context: int = 8192
    norm_epsilon: float = 1e-6
    output_norm_epsilon: float = 0.0
    selection_norm_epsilon: float = 0.0
    norm_offset: float = 1.0
    tied_embeddings: bool = True
    embedding_scale: bool = False
    logit_soft_cap: float = 0.0
    dtype: str = "bfloat16"
    remat: str = "elementwise"
    kernels: bool = True

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "ModelConfig":
        """From the section of a config, which may have other keys too."""
        return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})

    @property
    def head_width(self) -> int:
        """Width of one attention head, K = V."""
        return self.width // self.num_heads

    @property
    def heads(self) -> int:
        """Heads of a recurrence, H."""
        return self.recurrent_heads or self.num_heads

    @property
    def gate_blocks(self) -> int:
        """Blocks of the recurrence's gates: one per head. If the heads do not divide the recurrent width (Griffin 100M,
        400M, 3B and 14B, for which the paper does not say what it does), the largest smaller number that does."""
        return next(blocks for blocks in range(self.num_heads, 0, -1) if self.recurrent_width % blocks == 0)

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP, F."""
        return round(self.width * self.mlp_expansion)

    @property
    def activation_dtype(self) -> jnp.dtype:
        """``dtype`` as a dtype."""
        return jnp.dtype(self.dtype)

    @functools.cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """How the layers are laid out in the model's parameters."""
        return split(self.pattern, self.num_layers)

    @property
    def layers(self) -> tuple[str, ...]:
        """The mixer of each layer: the pattern repeated to the depth, with its last repetition cut short."""
        period = len(self.pattern)
        return tuple(self.pattern[i % period] for i in range(self.num_layers))
