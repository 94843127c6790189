"""The simplified state space layer S5 (Smith et al. 2022, arXiv:2208.04933).

    dh/dt = L h + B x,   z = 2 Re(C h) + D x            L: P / 2 eigenvalues, each standing for itself and its conjugate
    h_t = a h_{t-1} + b (B x_t)                         a step of Delta, one for each eigenvalue
    y_t = gelu(z_t) * sigmoid(W gelu(z_t))

with a = exp(L Delta), b = (a - 1) / L (zero-order hold) or a = (1 + L Delta / 2) / (1 - L Delta / 2),
b = Delta / (1 - L Delta / 2) (bilinear).

L starts as the spectrum of a block-diagonal matrix of J blocks, each the normal part of HiPPO-LegS: what is left of it
without its low-rank part (Gu et al. 2022, arXiv:2206.11893). With V its eigenvectors, B and C start as V^H B' and C' V,
where B' and C' are real and normal with variance 1 / fan-in: before the first update the layer is the real one of B' and
C'. Delta starts log-uniform. The real part of L is learned through its logarithm, so that no update makes the layer
unstable (Goel et al. 2022, arXiv:2202.09729).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.config import ModelConfig
from jaxlinear.models.layers import Linear, from_complex, parameter, to_complex
from jaxlinear.models.mixer import Mixer, State
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations, sharding

STEP_RANGE = (0.001, 0.1)  # of Delta, when training begins


class S5(Mixer):
    """S5 over ``[B, T, D]``, with P = ``recurrent_width`` and J = the config's ``heads``. State: ``h [B, P / 2]``,
    complex64.

    ``bidirectional``: z also reads a pass over the documents from their ends, with a C of its own. This is for sequences
    known in full: there is no state to continue from, and the future is seen, so it is not a key of a language model's
    config.
    """

    READS = ("num_heads", "recurrent_heads", "recurrent_width", "discretization")
    OVER_SEQUENCE = True
    rounded_parameters = ("output_kernel",)

    def __init__(self, config: ModelConfig, *, layer: int | jax.Array = 0, bidirectional: bool = False, rngs: nnx.Rngs):
        width, blocks = config.width, config.heads
        if config.recurrent_width % (2 * blocks):
            raise UserError(
                f"s5: model.recurrent_width={config.recurrent_width} does not split into {blocks} blocks of conjugate "
                f"pairs; it must be a multiple of {2 * blocks} (model.recurrent_heads, or model.num_heads, is the "
                "number of blocks)"
            )
        self.states, self.dtype, self.bidirectional = (
            config.recurrent_width // 2,
            config.activation_dtype,
            bidirectional,
        )
        self.discretize = DISCRETIZATIONS[config.discretization]
        eigenvalues, vectors = _hippo(config.recurrent_width // blocks)
        vector = functools.partial(parameter, shape=(self.states,), axes=("recurrent",), rngs=rngs)
        self.log_rate = vector(lambda key, shape, dtype: jnp.full(shape, np.log(0.5), dtype))
        self.frequency = vector(lambda key, shape, dtype: jnp.asarray(np.tile(eigenvalues.imag, blocks), dtype))
        self.log_step = vector(_log_step_init)
        axes = (None, "recurrent", "embed")
        output = functools.partial(parameter, _output_init(vectors), (2, self.states, width), axes, rngs)
        self.input_kernel = parameter(_input_init(vectors), (2, width, self.states), (None, "embed", "recurrent"), rngs)
        self.output_kernel = output()
        self.reverse_output_kernel = output() if bidirectional else None
        self.skip = parameter(nnx.initializers.normal(1.0), (width,), ("embed",), rngs)
        self.gate = Linear(width, width, axes=("embed", "mlp"), rngs=rngs)

    def init_state(self, batch: int) -> State:
        if self.bidirectional:
            raise UserError("s5: a bidirectional layer has no state; it sees each document whole")
        return {"h": jnp.zeros((batch, self.states), dtypes.wide(self.dtype, jnp.complex64))}

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, State | None]:
        """y and the state after it; None for the state if bidirectional."""
        if self.bidirectional and state is not None:
            raise UserError("s5: a bidirectional layer cannot continue from a state; it sees each document whole")
        if self.bidirectional and sharding.parts("time") > 1:
            raise UserError(
                f"mesh.sequence={sharding.parts('time')}: a bidirectional s5 layer does not run with the sequence "
                "sharded, since its second pass runs from the last shard to the first; set mesh.sequence to 1"
            )
        z, h = self.recur(x, segment_ids, None if state is None else state["h"])
        z = jax.nn.gelu(z)
        return z * jax.nn.sigmoid(self.gate(z)), None if self.bidirectional else {"h": h}

    def recur(self, x: jax.Array, segment_ids: jax.Array | None, past: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """z ``[B, T, D]``, in the dtype of x, and the last h ``[B, P / 2]``."""
        wide = dtypes.wide(x.dtype)
        rate, frequency, step, skip = (
            p[...].astype(wide) for p in (self.log_rate, self.frequency, self.log_step, self.skip)
        )
        a, b = self.discretize(jax.lax.complex(-jnp.exp(rate), frequency), jnp.exp(step))
        # b multiplies the matrix, not every token. Its gradient is then no sum of complex numbers over devices, which XLA
        # implements by a gather on TPU.
        real, imaginary = self.input_kernel[...].astype(wide)
        b_real, b_imaginary = jnp.real(b)[None], jnp.imag(b)[None]
        kernel = jnp.stack([real * b_real - imaginary * b_imaginary, real * b_imaginary + imaginary * b_real])
        u = sharding.constrain(to_complex(x, kernel), "batch", "time", "recurrent")
        h, last = operations.linear_recurrence(a, u, past, segment_ids=segment_ids)
        z = from_complex(h, self.output_kernel[...], x.dtype)
        if self.reverse_output_kernel is not None:
            h, _ = operations.linear_recurrence(a, u, segment_ids=segment_ids, reverse=True)
            z = z + from_complex(h, self.reverse_output_kernel[...], x.dtype)
        return (2 * z + skip[None, None] * x.astype(wide)).astype(x.dtype), last

    @classmethod
    def flops(cls, config: ModelConfig, length: int) -> float:
        """As the LRU with R / 2 states, plus a gate D x D."""
        d, r = config.width, config.recurrent_width
        return 2 * 2 * d * r + 2 * d * d + 4 * r + 2 * d


def zero_order_hold(eigenvalues: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a and b ``[P / 2]``, for an input that is constant between steps."""
    scaled = eigenvalues * step.astype(eigenvalues.dtype)
    return jnp.exp(scaled), jnp.expm1(scaled) / eigenvalues


def bilinear(eigenvalues: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a and b ``[P / 2]``, by the trapezoidal rule."""
    step = step.astype(eigenvalues.dtype)
    half = eigenvalues * step / 2
    return (1 + half) / (1 - half), step / (1 - half)


DISCRETIZATIONS = {"zero_order_hold": zero_order_hold, "bilinear": bilinear}


@functools.cache
def _hippo(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues with positive imaginary part ``[size / 2]`` of the normal part of HiPPO-LegS, and their
    eigenvectors ``[size, size / 2]``. It is -1/2 plus a skew-symmetric matrix, whose entries are those of HiPPO halved
    below the diagonal."""
    root = np.sqrt(2 * np.arange(size) + 1)
    lower = np.tril(np.outer(root, root) / 2, -1)
    frequencies, vectors = np.linalg.eigh(-1j * (lower.T - lower))
    return -0.5 + 1j * frequencies[size // 2 :], vectors[:, size // 2 :]


def _input_init(vectors: np.ndarray):
    """V^H B' as ``[2, D, P / 2]``, B' with variance 1 / D."""

    def init(key, shape, dtype):
        _, width, states = shape
        size, half = vectors.shape
        real = jax.random.normal(key, (width, states // half, size), dtype) * width**-0.5
        return _parts(real, vectors.conj()).reshape(shape)

    return init


def _output_init(vectors: np.ndarray):
    """C' V as ``[2, P / 2, D]``, C' with variance 1 / P."""

    def init(key, shape, dtype):
        _, states, width = shape
        size, half = vectors.shape
        real = jax.random.normal(key, (width, states // half, size), dtype) * (2 * states) ** -0.5
        return jnp.swapaxes(_parts(real, vectors).reshape(2, width, states), 1, 2)

    return init


def _parts(real: jax.Array, vectors: np.ndarray) -> jax.Array:
    """The real and the imaginary part of each block times its eigenvectors: ``[D, J, size]`` -> ``[2, D, J, size / 2]``."""
    parts = jnp.asarray(np.stack([vectors.real, vectors.imag]), real.dtype)
    return jnp.einsum("djn,cnm->cdjm", real, parts, precision=jax.lax.Precision.HIGHEST)


def _log_step_init(key, shape, dtype):
    low, high = np.log(STEP_RANGE)
    return jax.random.uniform(key, shape, dtype, low, high)
