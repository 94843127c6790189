"""The pieces that every block is built from: linear maps, normalisation, the gated MLP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlinear.models.config import ModelConfig
from jaxlinear.ops import dtypes
from jaxlinear.parallel import operations, sharding

Initializer = Callable[..., jax.Array]
_FEW_TOKENS = 32  # up to which ``by_outputs`` is faster


def fan_in_normal(scale: float = 1.0) -> Initializer:
    """Normal with variance ``scale / fan_in``; the fan-in is the axis before the last."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        # Earlier axes, such as the blocks of a block-diagonal matrix, are not part of the fan-in.
        others = tuple(range(len(shape) - 2))
        return nnx.initializers.variance_scaling(scale, "fan_in", "normal", batch_axis=others)(key, shape, dtype)

    return init


DEFAULT_INIT = fan_in_normal()


def parameter(init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...], rngs: nnx.Rngs) -> nnx.Param:
    """A float32 parameter with the logical axes that place it on a mesh."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """``x @ kernel + bias``: ``[..., inputs]`` -> ``[..., outputs]``, in the dtype of x.

    ``by_output``: the kernel is stored as ``[outputs, inputs]``, the layout that ``turn`` gives it. ``rounded``: x has the
    activation dtype, so the kernel is only read in that dtype (``round_for_decoding``).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool = True,
        init: Initializer = DEFAULT_INIT,
        rounded: bool = True,
        rngs: nnx.Rngs,
    ):
        self.rounded_parameters = ("kernel",) if rounded else ()
        self.kernel = parameter(init, (inputs, outputs), axes, rngs)
        self.bias = parameter(nnx.initializers.zeros, (outputs,), axes[1:], rngs) if bias else None
        self.by_output = False

    def turn(self) -> None:
        """Switches to the layout for decoding on a CPU (``by_outputs``)."""
        if not self.by_output:
            self.kernel = nnx.Param(self.kernel[...].T, axes=self.kernel.get_metadata("axes")[::-1])
            self.by_output = True

    def product(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """``x @ kernel`` in either layout of the kernel, in ``dtype``: by default that of x."""
        kernel = self.kernel[...]
        if self.by_output:
            return by_outputs(x, kernel.astype(x.dtype), dtype)
        if sharding.parts("batch") == sharding.parts("time") == 1:
            # The gradient of the kernel is then a sum over one axis. For one over two, XLA for CPUs would copy them.
            rows = operations.parameter_product("ri,io->ro", x.reshape(-1, x.shape[-1]), kernel, dtype)
            return rows.reshape(*x.shape[:-1], -1)
        return operations.parameter_product("...i,io->...o", x, kernel, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(x)
        if self.bias is None:
            return y
        # Added in float32, so that the gradient of the bias is summed in float32.
        wide = y.astype(dtypes.wide(y.dtype))
        return (wide + _last(self.bias[...], wide)).astype(y.dtype)


def round_for_decoding(model: nnx.Module, dtype: jnp.dtype) -> None:
    """Rounds the ``rounded_parameters`` of modules, which are read in no other dtype, to ``dtype``, that of activations.

    The results are the same, but the rounding happens only once. XLA for GPUs would otherwise read the parameters in
    float32, round them and write them for every token.
    """
    for _, module in nnx.iter_graph(model):
        for name in getattr(module, "rounded_parameters", ()):
            variable = getattr(module, name)
            if variable is not None:
                setattr(module, name, variable.replace(variable[...].astype(dtype)))


def by_outputs(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """``x @ kernel.T``: ``[B, T, I]`` by ``[O, I]`` -> ``[B, T, O]``, in ``dtype``, in the way that is fastest on a CPU for
    few tokens.

    XLA's products for CPUs rearrange their right operand before they begin, so with few tokens the kernel should be the
    left one. The barrier keeps XLA from swapping the operands back.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > _FEW_TOKENS:
        return jnp.einsum("bti,oi->bto", x, kernel, preferred_element_type=dtype)
    y = jax.lax.optimization_barrier(jnp.einsum("oi,ri->or", kernel, rows, preferred_element_type=dtype))
    return y.T.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """``x / rms(x) * (offset + scale)`` over the last axis, in float32 internally (Zhang and Sennrich, arXiv:1910.07467).

    The factor is 1 when training begins. With offset 1 the scale starts at 0, as in Griffin; with offset 0 the scale is
    Llama's weight.
    """

    def __init__(
        self, width: int, *, axis: str | None = "embed", epsilon: float = 1e-6, offset: float = 1.0, rngs: nnx.Rngs
    ):
        self.epsilon, self.offset = epsilon, offset
        self.scale = parameter(nnx.initializers.constant(1 - offset), (width,), (axis,), rngs)

    @property
    def factors(self) -> jax.Array:
        """By channel."""
        return self.offset + self.scale[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(dtypes.wide(x.dtype))
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * _last(self.factors, wide)).astype(x.dtype)


def rms_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """``x / rms(x)`` over the last axis, without weights, in float32 internally."""
    wide = x.astype(dtypes.wide(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


ACTIVATIONS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}


class GatedMLP(nnx.Module):
    """``down(activation(x @ gate) * (x @ up))`` (Shazeer 2020, arXiv:2002.05202): with GeLU, the channel mixing of Griffin
    (arXiv:2402.19427, section 2.2); with SiLU and no biases, that of Llama (arXiv:2302.13971, section 2.2)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, inner = config.width, config.mlp_width
        self.activation = config.mlp_activation
        self.gate = Linear(width, inner, axes=("embed", "mlp"), bias=config.bias, rngs=rngs)
        self.up = Linear(width, inner, axes=("embed", "mlp"), bias=config.bias, rngs=rngs)
        init = fan_in_normal(2 / config.num_layers)
        self.down = Linear(inner, width, axes=("mlp", "embed"), bias=config.bias, init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        return self.down(sharding.constrain(inner, "batch", "time", "mlp"))


def to_complex(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ (kernel[0] + i kernel[1])``: ``[B, T, D]`` by ``[2, D, N]`` -> ``[B, T, N]`` complex64."""
    wide = dtypes.wide(x.dtype)
    parts = (operations.parameter_product("btd,dn->btn", x, kernel[i], wide) for i in range(2))
    return jax.lax.complex(*parts)


def from_complex(h: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The real part of ``h @ (kernel[0] + i kernel[1])``, multiplied in ``dtype``: ``[B, T, N]`` by ``[2, N, D]`` ->
    ``[B, T, D]`` float32."""
    wide = dtypes.wide(dtype)
    products = (
        operations.parameter_product("btn,nd->btd", part(h).astype(dtype), kernel[i], wide)
        for i, part in enumerate((jnp.real, jnp.imag))
    )
    return next(products) - next(products)


def _last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """``[D]`` as ``[1, ..., 1, D]`` in the dtype of x."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
