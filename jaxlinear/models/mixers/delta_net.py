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

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.heads import HeadNorm, by_head, per_head
from jaxlinear.models.layers import Linear, fan_in_normal
from jaxlinear.models.short_convolution import ShortConvolution
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations, sharding

OWN_GATE = {"delta_net": "none", "gated_delta_net": "silu"}  # the meaning of ``model.output_gate`` "auto", by mixer


def has_gate(config: ModelConfig, mixer: str = "delta_net") -> bool:
    """Whether the output of one of ``OWN_GATE``'s mixers is multiplied by a gate."""
    gate = config.output_gate
    return (OWN_GATE[mixer] if gate == "auto" else gate) == "silu"


def widths(config: ModelConfig, mixer: str = "delta_net") -> tuple[int, int, int]:
    """H, K and V. Over all heads, K and V each add up to D, unless they are given."""
    heads = config.heads
    key_width = config.key_width or per_head(mixer, config.width, heads)
    return heads, key_width, config.value_width or per_head(mixer, config.width, heads)


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

        def project(outputs: int) -> Linear:
            return Linear(config.width, outputs, axes=("embed", "heads"), bias=False, rngs=rngs)

        def convolve(channels: int) -> ShortConvolution:
            return ShortConvolution(
                channels, config.convolution_width, axis="heads", kernel_on=("tpu", "gpu"), rngs=rngs
            )

        self.query, self.query_convolution = project(heads * key_width), convolve(heads * key_width)
        self.key, self.key_convolution = project(written * key_width), convolve(written * key_width)
        self.value, self.value_convolution = project(written * value_width), convolve(written * value_width)
        self.beta = project(written)

    def init_state(self, batch: int) -> dict[str, jax.Array]:
        return {
            "query": self.query_convolution.init_state(batch, self.dtype),
            "key": self.key_convolution.init_state(batch, self.dtype),
            "value": self.value_convolution.init_state(batch, self.dtype),
        }

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None, past: dict[str, jax.Array]
    ) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
        """``((q, k, v, beta), state)``; an empty ``past`` means zeros."""
        new: dict[str, jax.Array] = {}
        k, new["key"] = self.key_convolution(
            self.key(x), segment_ids=segment_ids, state=past.get("key"), heads=self.written
        )
        v, new["value"] = self.value_convolution(self.value(x), segment_ids=segment_ids, state=past.get("value"))
        beta = jax.nn.sigmoid(self.beta(x).astype(dtypes.wide(x.dtype)))
        beta = 2 * beta if self.negative_eigenvalues else beta
        x = operations.after(x, (k, v, beta))  # the states do not depend on the queries
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


class DeltaOutput(nnx.Module):
    """Maps ``o [B, T, H, V]`` to the layer's output: ``out(norm(o))``, or ``out(norm(o) * silu(gate(x)))``.

    It is a base class of mixers rather than a part of them: in checkpoints ``gate``, ``norm`` and ``out`` belong to the
    mixer.
    """

    def _add_output(self, config: ModelConfig, heads: int, value_width: int, *, gated: bool, rngs: nnx.Rngs) -> None:
        width, inner = config.width, heads * value_width
        self.gate = Linear(width, inner, axes=("embed", "heads"), bias=False, rngs=rngs) if gated else None
        self.norm = HeadNorm(value_width, epsilon=config.norm_epsilon, offset=config.norm_offset, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.out = Linear(inner, width, axes=("heads", "embed"), bias=False, init=init, rngs=rngs)

    def _output(self, o: jax.Array, x: jax.Array) -> jax.Array:
        o = o.reshape(*x.shape[:2], -1).astype(x.dtype)
        return self.out(self.norm(o) if self.gate is None else self.norm.gated(o, self.gate(x)))


class DeltaNet(DeltaOutput):
    """Over ``[B, T, D]``. State: ``memory [B, H, K, V]`` and that of ``DeltaInputs``."""

    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        self.widths = heads, _, value_width = widths(config)
        self.inputs = DeltaInputs(config, *self.widths, rngs=rngs)
        self._add_output(config, heads, value_width, gated=has_gate(config), rngs=rngs)

    def init_state(self, batch: int) -> dict[str, jax.Array]:
        memory = jnp.zeros((batch, *self.widths), dtypes.wide(self.inputs.dtype))
        return {"memory": memory, **self.inputs.init_state(batch)}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: dict[str, jax.Array] | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        past = {} if state is None else state
        (q, k, v, beta), new = self.inputs(x, segment_ids=segment_ids, past=past)
        options = {"segment_ids": segment_ids, "negative_eigenvalues": self.inputs.negative_eigenvalues}
        o, new["memory"] = operations.delta_rule(q, k, v, beta, None, past.get("memory"), **options)
        return self._output(o, x), new
