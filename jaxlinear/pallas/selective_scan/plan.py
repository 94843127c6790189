"""The selective scan, one kernel each way: forward, its summary, and its gradients.

    S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T,   y_t = S_t C_t,        with A None 1 - dt_t (B_t^T)^2 for exp(dt_t A)

The transitions and states of a token, N numbers for each of its channels, exist only in registers. Backward, with G_t the
gradient of S_t and a_t its transition,

    G_t = C_t dy_t + a_{t+1} G_{t+1},   dC_t = sum_d S_t dy_t,   d(dt_t x_t) = sum_n G_t B_t,   dB_t = sum_d G_t dt_t x_t,

and for the transition ``da_t = G_t S_{t-1}``, from which the gradients of dt_t and A, or of dt_t and B_t, follow. The
states are recomputed from those before blocks of time, which the forward pass keeps.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Arguments(NamedTuple):
    """Arguments of a run. The computation is in the dtype of ``state``, which is also that of ``A``."""

    x: jax.Array | None  # [B, T, D]; None if no requested output depends on it
    dt: jax.Array  # [B, T, D]
    A: jax.Array | None  # [N, D]; if None, the transition is 1 - dt B^2
    B: jax.Array | None  # [B, T, N]; None if no requested output depends on it
    C: jax.Array | None  # [B, T, N]; None for a summary
    state: jax.Array  # [B, N, D]: before the run; for a gradient, that of the state after it
    starts: jax.Array | None  # [B, T] bool, where the state before the token is forgotten
    before: jax.Array | None = None  # [B, blocks, N, D], for a gradient: the state before each forward block
    d_y: jax.Array | None = None  # [B, T, D], for either gradient


@dataclasses.dataclass(frozen=True)
class Plan:
    """One pass.

    Attributes:
      kind: "forward" gives y ``[B, T, D]`` and the state after the run ``[B, N, D]``; "summary" only the latter;
        "gradient" those of x, dt ``[B, T, D]``, B, C ``[B, T, N]``, A ``[N, D]`` and the state ``[B, N, D]``;
        "state_gradient" only the last of these.
      keep: for a forward pass, also give the states before blocks, for the gradient.
      rates: the transition is ``exp(dt A)``; otherwise ``1 - dt B^2``.
      packed: with ``starts``.
    """

    kind: str
    keep: bool
    rates: bool
    packed: bool

    @property
    def name(self) -> str:
        marks = [mark for mark in ("keep", "packed") if getattr(self, mark)]
        return "_".join(["selective_scan", self.kind, *([] if self.rates else ["of_keys"]), *marks])

    @property
    def reverse(self) -> bool:
        return self.kind in ("gradient", "state_gradient")

    def cost(self, arguments: Arguments, outputs) -> pl.CostEstimate:
        numbers = arguments.dt.size * arguments.state.shape[1]
        arrays = [*jax.tree.leaves(arguments), *jax.tree.leaves(outputs)]
        return pl.CostEstimate(
            flops=numbers * {"forward": 6, "summary": 4, "gradient": 20, "state_gradient": 4}[self.kind],
            transcendentals=numbers * self.rates * (2 if self.kind == "gradient" else 1),
            bytes_accessed=sum(y.size * jnp.dtype(y.dtype).itemsize for y in arrays),
        )
