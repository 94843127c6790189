"""The linear recurrent unit and the gated unit after it (Orvieto et al. 2023, arXiv:2303.06349).

    a = exp(-exp(nu) + i exp(theta))                    N complex numbers within the unit circle, whatever nu is
    h_t = a h_{t-1} + exp(gamma) (B x_t)                B and C complex, nu, theta and gamma real
    z_t = Re(C h_t) + D x_t
    y_t = (W_1 z_t) * sigmoid(W_2 z_t)

a starts uniform on a ring, and gamma such that h has variance 1 on white noise, exp(gamma)^2 = 1 - |a|^2. B and C start
normal with variance 1/2 (of the real and the imaginary part) over the fan-in of B and 1 over that of C (appendix A).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, fan_in_normal, from_complex, parameter, to_complex
from jaxlinear.models.mixer import Mixer, State
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations, sharding

RADIUS_RANGE = (0.9, 0.999)  # of |a|, when training begins
LARGEST_PHASE = 2 * jnp.pi


class LRU(Mixer):
    """The unit over ``[B, T, D]``, with N = ``recurrent_width`` complex states. State: ``h [B, N]``, complex64."""

    READS = ("recurrent_width",)
    OVER_SEQUENCE = True
    rounded_parameters = ("output_kernel",)

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, rngs: nnx.Rngs):
        width, self.states = config.width, config.recurrent_width
        self.dtype = config.activation_dtype
        self.nu = parameter(_nu_init, (self.states,), ("recurrent",), rngs)
        self.theta = parameter(_theta_init, (self.states,), ("recurrent",), rngs)
        self.gamma = parameter(lambda *_: _gamma_init(self.nu[...]), (self.states,), ("recurrent",), rngs)
        self.input_kernel = parameter(fan_in_normal(0.5), (2, width, self.states), (None, "embed", "recurrent"), rngs)
        self.output_kernel = parameter(fan_in_normal(), (2, self.states, width), (None, "recurrent", "embed"), rngs)
        self.skip = parameter(nnx.initializers.normal(1.0), (width,), ("embed",), rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.value = Linear(width, width, axes=("embed", "mlp"), init=init, rngs=rngs)
        self.gate = Linear(width, width, axes=("embed", "mlp"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        return {"h": jnp.zeros((batch, self.states), dtypes.wide(self.dtype, jnp.complex64))}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State]:
        z, h = self.recur(x, segment_ids, None if state is None else state["h"])
        return self.value(z) * jax.nn.sigmoid(self.gate(z)), {"h": h}

    def recur(self, x: jax.Array, segment_ids: jax.Array | None, past: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """z ``[B, T, D]``, in the dtype of x, and the last h ``[B, N]``."""
        wide = dtypes.wide(x.dtype)
        nu, theta, gamma, skip = (p[...].astype(wide) for p in (self.nu, self.theta, self.gamma, self.skip))
        a = jnp.exp(jax.lax.complex(-jnp.exp(nu), jnp.exp(theta)))
        # gamma multiplies the matrix, not every token. Its gradient is then no sum of complex numbers over devices, which
        # XLA implements by a gather on TPU.
        kernel = self.input_kernel[...].astype(wide) * jnp.exp(gamma)[None, None]
        u = sharding.constrain(to_complex(x, kernel), "batch", "time", "recurrent")
        h, last = operations.linear_recurrence(a, u, past, segment_ids=segment_ids)
        z = from_complex(h, self.output_kernel[...], x.dtype) + skip[None, None] * x.astype(wide)
        return z.astype(x.dtype), last

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """B, D x R, and the real part of C, R x D, both complex; the gated unit D x 2 D; for each state a complex product
        and sum (8); and the skip."""
        d, r = config.width, config.recurrent_width
        return 2 * 2 * 2 * d * r + 2 * 2 * d * d + 8 * r + 2 * d


def _nu_init(key, shape, dtype):
    """Such that |a|^2 is uniform between the squares of ``RADIUS_RANGE``."""
    low, high = (bound**2 for bound in RADIUS_RANGE)
    return jnp.log(-0.5 * jnp.log(jax.random.uniform(key, shape, dtype, low, high)))


def _theta_init(key, shape, dtype):
    """Such that the phase is uniform between 0, which has no logarithm, and ``LARGEST_PHASE``."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-6, LARGEST_PHASE))


def _gamma_init(nu):
    return 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu)))
