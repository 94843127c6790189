"""An RMSNorm over each head, with its gate, as a kernel.

    r = x + s v;    n = r f(z), or r where the norm comes before the gate;    i = 1 / sqrt(mean(n^2) + epsilon)
    y = w n i, or w n i f(z);    f: SiLU or the sigmoid

Each program has whole heads. A pass reads and writes each array once; backward it computes these again, and

    e = dy, or dy f(z);      dw = sum_t n i e;      dn = i (w e - n i^2 mean(w e n))
    dr = dn f(z), or dn;     dz = f'(z) r dn, or f'(z) w n i dy
    dx = dr;    dv = s dr;   ds = sum_t v dr

``gated_rms_norm_tpu`` and ``gated_rms_norm_gpu`` are the kernels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """Of one device. ``weights``: w and, unless there is no v, s, ``[1 or 2, D]`` in the dtype to compute in; the others
    are ``[B, T, D]``. The gradients have the same shapes and dtypes."""

    x: jax.Array
    gate: jax.Array  # z
    skipped: jax.Array | None  # v
    weights: jax.Array


class Norm(NamedTuple):
    """``head``: its channels."""

    head: int
    epsilon: float
    before_gate: bool
    activation: str  # f: "silu" or "sigmoid"


class Channels(NamedTuple):
    """What is known of some channels of some tokens before their norm is."""

    r: jax.Array
    gate: jax.Array  # z
    opened: jax.Array  # sigmoid(z)
    norm: Norm

    @property
    def factor(self) -> jax.Array:
        """f(z)."""
        return self.gate * self.opened if self.norm.activation == "silu" else self.opened

    @property
    def slope(self) -> jax.Array:
        """f'(z)."""
        closed = 1 - self.opened
        return self.opened + self.factor * closed if self.norm.activation == "silu" else self.opened * closed

    @property
    def n(self) -> jax.Array:
        return self.r if self.norm.before_gate else self.r * self.factor

    def output(self, inverse: jax.Array, w: jax.Array) -> jax.Array:
        y = self.n * inverse * w
        return y * self.factor if self.norm.before_gate else y

    def of_normed(self, d_y: jax.Array) -> jax.Array:
        """e, the gradient of ``w n i``."""
        return d_y * self.factor if self.norm.before_gate else d_y

    def gradients(self, d_y: jax.Array, inverse: jax.Array, along: jax.Array, w: jax.Array) -> tuple[Any, Any, Any]:
        """Of r, of z, and what is to be summed for w. ``along``: ``i^2 mean(w e n)``."""
        d, normed = self.of_normed(d_y), self.n * inverse
        d_n = inverse * (d * w - self.n * along)
        d_r, d_factor = (d_n, d_y * normed * w) if self.norm.before_gate else (d_n * self.factor, d_n * self.r)
        return d_r, d_factor * self.slope, d * normed


def inverse_and_along(square, product, norm: Norm) -> tuple[jax.Array, jax.Array]:
    """i and ``along``, from the sums of ``n^2`` and of ``w e n`` over a head."""
    inverse = jax.lax.rsqrt(square / norm.head + norm.epsilon)
    return inverse, inverse * inverse * (product / norm.head)


def cost(inputs: Inputs, backward: bool) -> dict[str, int]:
    """That of ``pallas.CostEstimate``."""
    arrays = 3 if inputs.skipped is None else 4
    arrays = 2 * arrays - 1 if backward else arrays
    size = inputs.x.size
    return {
        "flops": size * (40 if backward else 15),
        "transcendentals": 2 * size,
        "bytes_accessed": arrays * size * jnp.dtype(inputs.x.dtype).itemsize,
    }
