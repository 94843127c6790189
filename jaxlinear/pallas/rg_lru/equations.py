"""What the RG-LRU makes of its gates, and the gradients, in kernels.

    r = sigmoid(z_r),   i = sigmoid(z_i),   a = exp(rate r),   u = w i x

with w = sqrt(q) and q = 1 - a^2, but for the first token of a document, whose w is 1. Backward,

    dq = du i x / max(2 w, 1 / LARGEST_SLOPE),    dlog a = a (da - 2 a dq),    drate = sum dlog a r
    dz_r = dlog a rate r (1 - r),    dz_i = du w x i (1 - i),    dx = du w i + dz_r W_a^T + dz_i W_x^T,    dW = x^T dz

and dq = 0 for the first token of a document. Powers are of 2, which is what TPUs and GPUs compute, and in float32 q is a
series in log a where a is close to 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LARGEST_SLOPE = 1000.0  # of the square root: its own grows without bound as a -> 1
LOG2_E = math.log2(math.e)
_LEAST = 1e-30  # of what a reciprocal root is taken of
_NEAR = 1 / 24  # -log2 a up to which 1 - a^2 is a series: with a product it would have lost 4 of 24 digits there


class Gates(NamedTuple):
    """In the dtype to compute in."""

    r: jax.Array
    i: jax.Array
    a: jax.Array
    q: jax.Array
    x: jax.Array

    def input(self, is_first: jax.Array) -> jax.Array:
        """u."""
        return self._weight(is_first) * (self.i * self.x)

    def gradients(
        self, rate: jax.Array, d_a: jax.Array, d_u: jax.Array, is_first: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Those of z_r, of z_i, of the rate, before its sum, and the part of x's that is not the products'."""
        r, i, a = self.r, self.i, self.a
        ix, d_ix = i * self.x, d_u * self._weight(is_first)
        d_q = _unless(is_first, d_u * ix * self._slope(), 0)
        of_rate = a * (d_a - 2 * a * d_q) * r
        return of_rate * rate * (1 - r), d_ix * ix * (1 - i), of_rate, d_ix * i

    def _weight(self, is_first: jax.Array) -> jax.Array:
        return _unless(is_first, self.q * self._inverse_root(), 1)

    def _slope(self) -> jax.Array:
        """Of the root."""
        return jnp.minimum(0.5 * self._inverse_root(), LARGEST_SLOPE)

    def _inverse_root(self) -> jax.Array:
        return lax.rsqrt(jnp.maximum(self.q, _LEAST))


def one_minus_square(log2_a: jax.Array, a: jax.Array) -> jax.Array:
    """q."""
    if a.dtype != jnp.float32:
        return -jnp.expm1(2 * math.log(2) * log2_a)  # which is not compiled
    series = jnp.zeros_like(a)
    for n in reversed(range(1, 5)):  # -(exp(y) - 1) for y = 2 log a
        series = log2_a * (series - (2 * math.log(2)) ** n / math.factorial(n))
    return jnp.where(log2_a > -_NEAR, series, 1 - a * a)


def _unless(condition: jax.Array, y: jax.Array, other: float) -> jax.Array:
    return jnp.where(condition, jnp.full_like(y, other), y)
