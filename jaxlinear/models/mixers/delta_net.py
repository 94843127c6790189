"""DeltaNet (Yang et al. 2024, arXiv:2406.06484): what the state holds at a key is replaced, not added to.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,  beta_t = sigmoid(W_beta x_t)                one beta per head
    o_t = K^-0.5 S_t^T q_t

q, k and v are projections of x after a short convolution and SiLU; q and k are then scaled to unit length in each head. The
layer is ``out(norm(o))``, with the norm over each head. The factor K^-0.5 follows the authors' program
(github.com/fla-org/flash-linear-attention); apart from the norm's epsilon it changes nothing.

With ``model.output_gate`` "silu" it is ``out(norm(o) * silu(W_g x))``, as with that program's ``use_gate``.

With ``model.negative_eigenvalues`` beta_t is doubled (Grazzi et al. 2024, arXiv:2411.12537). The transition
I - beta_t k_t k_t^T, which multiplies the state, then has an eigenvalue for k_t in (-1, 1) instead of (0, 1).

With J = ``model.householders`` above 1 it is DeltaProduct (Siems et al. 2025, arXiv:2502.10297): a token makes J updates,
one after another, each with its own key, value and beta, and is read after the last. Its transition is then a product of J
such matrices, generalised Householder reflections.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import HeadNorm, by_head
from jaxlinear.models.layers import Linear
from jaxlinear.models.mixer import MatrixMixer, State, project
from jaxlinear.models.short_convolution import ShortConvolution
from jaxlinear.ops import dtypes
from jaxlinear.ops.delta_rule.op import flops as delta_rule_flops
from jaxlinear.parallel import operations, sharding


class DeltaInputs(nnx.Module):
    """The inputs of the delta rule, here and in the mixers that add decays to it: q and k ``[B, T, H, K]`` of unit length,
    v ``[B, T, H, V]`` and beta ``[B, T, H]`` in float32; with J householders k, v and beta have an axis J after H.

    State: the inputs of the convolutions, ``query`` ``[B, width-1, H K]``, ``key`` ``[B, width-1, H J K]`` and ``value``
    ``[B, width-1, H J V]``. The channels of a head are adjacent, whatever J, since a mesh divides the heads.
    """

    def __init__(self, config: ModelConfig, heads: int, key_width: int, value_width: int, *, rngs: nnx.Rngs):
        self.heads, self.dtype = heads, config.activation_dtype
        self.negative_eigenvalues = config.negative_eigenvalues
        self.updates = () if config.householders == 1 else (config.householders,)  # the axis J, if there is one
        self.written = written = heads * config.householders

        def convolved(channels: int) -> tuple[Linear, ShortConvolution]:
            linear = project(config, channels, rngs=rngs)
            width = config.convolution_width
            return linear, ShortConvolution(channels, width, axis="heads", feeds_kernel=True, rngs=rngs)

        self.query, self.query_convolution = convolved(heads * key_width)
        self.key, self.key_convolution = convolved(written * key_width)
        self.value, self.value_convolution = convolved(written * value_width)
        self.beta = project(config, written, rngs=rngs)

    def init_state(self, batch: int) -> State:
        return {
            "query": self.query_convolution.init_state(batch, self.dtype),
            "key": self.key_convolution.init_state(batch, self.dtype),
            "value": self.value_convolution.init_state(batch, self.dtype),
        }

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None, past: State
    ) -> tuple[tuple[jax.Array, ...], State]:
        """``((q, k, v, beta), state)``; an empty ``past`` means zeros."""
        new: State = {}
        k, new["key"] = self.key_convolution(
            self.key(x), segment_ids=segment_ids, state=past.get("key"), heads=self.written
        )
        v, new["value"] = self.value_convolution(self.value(x), segment_ids=segment_ids, state=past.get("value"))
        beta = jax.nn.sigmoid(self.beta(x).astype(dtypes.wide(x.dtype)))
        beta = 2 * beta if self.negative_eigenvalues else beta
        x = operations.overlapping(x, (k, v, beta))  # the states do not depend on the queries
        q, new["query"] = self.query_convolution(
            self.query(x), segment_ids=segment_ids, state=past.get("query"), heads=self.heads
        )
        q = by_head(q, self.heads)
        k, v = (by_head(y, self.heads, *self.updates) for y in (k, v))
        beta = beta.reshape(*x.shape[:2], self.heads, *self.updates)
        if self.negative_eigenvalues:
            # A rounded key may be longer than 1. With a beta near 2 the eigenvalue would then lie beyond -1, and the state
            # would grow without bound if the key kept recurring.
            wide = lax.stop_gradient(k).astype(beta.dtype)
            beta = beta / jnp.maximum(jnp.sum(wide * wide, axis=-1), jnp.ones((), beta.dtype))
        return (q, k, v, sharding.constrain(beta, "batch", "time", "heads", *(None,) * len(self.updates))), new


class DeltaNet(MatrixMixer):
    """Over ``[B, T, D]``. State: ``memory [B, H, K, V]`` and that of ``DeltaInputs``. Mixers that add a decay derive from
    it."""

    READS: ClassVar[tuple[str, ...]] = (
        "num_heads",
        "recurrent_heads",
        "key_width",
        "value_width",
        "convolution_width",
        "output_gate",
        "negative_eigenvalues",
        "householders",
    )
    OWN_GATE: ClassVar[str] = "none"  # the meaning of ``model.output_gate`` "auto"

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        super().__init__(config)
        self.inputs = DeltaInputs(config, self.heads, self.key_width, self.value_width, rngs=rngs)
        self.add_decay(config, rngs)
        self.gate = self.make_gate(config, rngs)
        self.norm = HeadNorm(self.value_width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        self.out = self.project_out(config, rngs=rngs)

    @classmethod
    def has_gate(cls, config: ModelConfig) -> bool:
        """Whether the output is multiplied by a gate."""
        return (cls.OWN_GATE if config.output_gate == "auto" else config.output_gate) == "silu"

    def make_gate(self, config: ModelConfig, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array] | None:
        """The map of x to the output gate before its activation, if there is one."""
        return self.project_values(config, rngs=rngs) if self.has_gate(config) else None

    def add_decay(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """The parameters of ``log_decay``."""

    def log_decay(self, x: jax.Array) -> jax.Array | None:
        """Of the operation: None here."""
        return None

    def init_state(self, batch: int) -> State:
        return super().init_state(batch) | self.inputs.init_state(batch)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        past = {} if state is None else state
        (q, k, v, beta), new = self.inputs(x, segment_ids=segment_ids, past=past)
        options = {"segment_ids": segment_ids, "negative_eigenvalues": self.inputs.negative_eigenvalues}
        o, new["memory"] = operations.delta_rule(q, k, v, beta, self.log_decay(x), past.get("memory"), **options)
        o = o.reshape(*x.shape[:2], -1).astype(x.dtype)
        return self.out(self.norm(o) if self.gate is None else self.gated(o, self.gate(x))), new

    def gated(self, o: jax.Array, gate: jax.Array) -> jax.Array:
        """``[B, T, H V]``: the norm of o times the gate."""
        return self.norm.gated(o, gate)

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """The inputs, the recurrence, the projection H V x D, and that of a gate, D x H V."""
        h, _, v = cls.widths(config)
        return cls.flops_of_updates(config) + 2 * config.width * h * v * (1 + cls.has_gate(config))

    @classmethod
    def flops_of_updates(cls, config: ModelConfig) -> float:
        """For J updates, projections D x H (K + J (K + V + 1)), the convolutions of q, k and v, and the recurrence."""
        (h, k, v), updates = cls.widths(config), config.householders
        channels = h * (k + updates * (k + v))
        inputs = 2 * config.width * (channels + h * updates) + 2 * config.convolution_width * channels
        return inputs + delta_rule_flops(h, k, v, updates)
