"""Mamba (Gu and Dao 2023, arXiv:2312.00752): a recurrence whose time step, writing and reading follow from its input. Also
Falcon-Mamba (Zuo et al. 2024, arXiv:2410.05355), which normalises these.

    x_t = silu(conv(W_x u_t)),   z_t = W_z u_t
    r_t, B_t, C_t = W_s x_t                                      a time step of low rank, and N numbers each
    dt_t = softplus(W_dt r_t + dt_bias)                          one per channel
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + (dt_t x_t) B_t^T       N numbers per channel
    y_t = W_o ((S_t C_t + D x_t) * silu(z_t))

With ``model.selection_norm``, as in Falcon-Mamba, norm(r_t), norm(B_t) and norm(C_t) replace r_t, B_t and C_t, where

    norm(v) = v / sqrt(mean(v^2) + epsilon)                      without weights, with an epsilon of its own if wanted

The rank of the time step is ceil(D / 16) unless it is given. A starts at -1 .. -N in every channel (S4D-Real).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, fan_in_normal, parameter, rms_norm
from jaxlinear.models.mixer import Mixer, State
from jaxlinear.models.mixers.mamba2 import PROJECTION_SCALE, time_step_biases, time_steps
from jaxlinear.models.short_convolution import ShortConvolution
from jaxlinear.ops import dtypes
from jaxlinear.ops.selective_scan.op import flops as selective_scan_flops
from jaxlinear.parallel import operations

STATES = 16  # N, unless the config gives a key width
_CHANNELS_OF_A_RANK = 16  # of D


def paper_rank(width: int) -> int:
    """The rank of the time step unless the config gives another."""
    return -(-width // _CHANNELS_OF_A_RANK)


class Mamba(Mixer):
    """Over ``[B, T, D]``, with R = ``recurrent_width`` inner channels, 2 D in the paper, and N = ``key_width``, 16 unless
    given. State: ``memory [B, R, N]``, and the inputs of the convolution ``value [B, width-1, R]``."""

    READS: ClassVar[tuple[str, ...]] = (
        "recurrent_width",
        "key_width",
        "time_step_rank",
        "convolution_width",
        "selection_norm",
        "selection_norm_epsilon",
    )
    OVER_SEQUENCE = True

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        self.states, self.rank = self.widths(config)
        width, self.inner, self.dtype = config.width, config.recurrent_width, config.activation_dtype

        def project(inputs: int, outputs: int, axes: tuple[str | None, str | None], rounded: bool = True) -> Linear:
            init = fan_in_normal(PROJECTION_SCALE)
            return Linear(inputs, outputs, axes=axes, bias=False, init=init, rounded=rounded, rngs=rngs)

        self.value, self.gate = (project(width, self.inner, ("embed", "recurrent")) for _ in range(2))
        self.value_convolution = ShortConvolution(
            self.inner, config.convolution_width, axis="recurrent", bias=True, feeds_kernel=True, rngs=rngs
        )
        self.selection = project(self.inner, self.rank + 2 * self.states, ("recurrent", None))
        self.selection_epsilon = self.epsilon_of_selection(config)
        self.time_step = project(self.rank, self.inner, (None, "recurrent"), rounded=False)
        self.add_transition(rngs)
        self.D = parameter(nnx.initializers.ones, (self.inner,), ("recurrent",), rngs)
        init = fan_in_normal(PROJECTION_SCALE / config.num_layers)
        self.out = Linear(self.inner, width, axes=("recurrent", "embed"), bias=False, init=init, rngs=rngs)

    @staticmethod
    def epsilon_of_selection(config: ModelConfig) -> float | None:
        """The epsilon of the norms of ``model.selection_norm``; None if there are none."""
        return (config.selection_norm_epsilon or config.norm_epsilon) if config.selection_norm else None

    def add_transition(self, rngs: nnx.Rngs) -> None:
        """The parameters of ``transition``."""

        def log_rates(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jnp.broadcast_to(jnp.log(np.arange(1, shape[1] + 1, dtype=dtype))[None], shape)

        self.dt_bias = parameter(time_step_biases, (self.inner,), ("recurrent",), rngs)
        self.A_log = parameter(log_rates, (self.inner, self.states), ("recurrent", None), rngs)

    @classmethod
    def widths(cls, config: ModelConfig) -> tuple[int, int]:
        """N, and the rank of the time step."""
        return config.key_width or STATES, config.time_step_rank or paper_rank(config.width)

    def init_state(self, batch: int) -> State:
        return {
            "memory": jnp.zeros((batch, self.inner, self.states), dtypes.wide(self.dtype)),
            "value": self.value_convolution.init_state(batch, self.dtype),
        }

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        past = {} if state is None else state
        v, convolved = self.value_convolution(self.value(x), segment_ids=segment_ids, state=past.get("value"))
        # Not rounded to the dtype of x: a time step accumulates over time, and the others are few.
        selected = self.selection.product(v, dtypes.wide(x.dtype))
        parts = jnp.split(selected, (self.rank, self.rank + self.states), axis=-1)
        if self.selection_epsilon is not None:
            parts = [rms_norm(part, self.selection_epsilon) for part in parts]
        low, B, C = parts
        dt, A = self.transition(self.time_step.product(low), B)
        y, memory = operations.selective_scan(v, dt, A, B, C, past.get("memory"), segment_ids=segment_ids)
        z = self.gate(operations.overlapping(x, (v, dt, B, C))).astype(dt.dtype)
        y = y.astype(dt.dtype) + self.D[...].astype(dt.dtype)[None, None] * v.astype(dt.dtype)
        return self.out((y * jax.nn.silu(z)).astype(x.dtype)), {"memory": memory, "value": convolved}

    def transition(self, logits: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """dt ``[B, T, R]`` and A ``[R, N]`` of ``selective_scan``, in the dtype of the logits of dt, float32 at least."""
        return time_steps(logits, self.dt_bias[...]), -jnp.exp(self.A_log[...].astype(logits.dtype))

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """Projections D x 2 R and R x D, those of the selection, R x (rank + 2 N) and rank x R, the
        convolution and the recurrence; and for each channel dt x and the skip."""
        d, r, w = config.width, config.recurrent_width, config.convolution_width
        n, rank = cls.widths(config)
        return 2 * d * 3 * r + 2 * r * (2 * rank + 2 * n) + 2 * w * r + selective_scan_flops(r, n) + 3 * r
