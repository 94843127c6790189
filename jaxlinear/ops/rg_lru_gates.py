"""The gates of the RG-LRU (De et al. 2024, arXiv:2402.19427): from activations to the recurrence's transition and input.

    r_t = sigmoid(W_a x_t + b_a),   i_t = sigmoid(W_x x_t + b_x),   a_t = exp(rate r_t),   u_t = sqrt(1 - a_t^2) (i_t x_t)

Nothing depends on another token. The products are small, and what is large are the arrays between them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, matrix_states
from jaxlinear.pallas import derivatives
from jaxlinear.pallas import rg_lru_gates as kernels
from jaxlinear.pallas.rg_lru_equations import LARGEST_SLOPE
from jaxlinear.pallas.target import Target

_INSTEAD = "products"  # of the kernel, where it does not run


@calls.recorded
def rg_lru_gates(
    x: jax.Array,
    recurrence_kernel: jax.Array,
    recurrence_bias: jax.Array,
    input_kernel: jax.Array,
    input_bias: jax.Array,
    rate: jax.Array,
    first: jax.Array,
    *,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The a and the u of ``h_t = a_t * h_{t-1} + u_t``.

    Args:
      x: ``[B, T, R]``.
      recurrence_kernel, input_kernel: ``[N, K, K]``, the diagonal blocks of W_a and W_x, with N K = R. They are rounded to
        the dtype of x; their gradients have their own dtype.
      recurrence_bias, input_bias: ``[R]``.
      rate: ``[R]``, log a at r = 1, at most 0.
      first: ``[B, T]`` bool, true for the first token of a document, which enters with weight 1: u = i x.
      backend: ``"products"`` (XLA), ``"pallas"`` (a kernel for TPU, interpreted on CPU) or ``"auto"``: the kernel on TPU
        for more than 8 tokens; where it does not run, that is logged once.

    Returns:
      a and u ``[B, T, R]`` in float32 (float64 if x is). The slope of the square root is bounded by 1,000: its own grows
      without bound as a -> 1.
    """
    x, recurrence_kernel, input_kernel = (jnp.asarray(y) for y in (x, recurrence_kernel, input_kernel))
    recurrence_bias, input_bias, rate, first = (jnp.asarray(y) for y in (recurrence_bias, input_bias, rate, first))
    check_shapes(
        "rg_lru_gates",
        x,
        recurrence_kernel,
        input_kernel,
        first,
        recurrence_bias=recurrence_bias,
        input_bias=input_bias,
        rate=rate,
    )
    vectors = [y.astype(dtypes.wide(x.dtype)) for y in (recurrence_bias, input_bias, rate)]
    if choose(backend, x, recurrence_kernel) == "pallas":
        both = jnp.stack([recurrence_kernel, input_kernel])
        return _by_kernel(x, both, jnp.stack(vectors), first, backends.target())
    return _by_products(x, recurrence_kernel, input_kernel, vectors, first)


def choose(backend: str, x: jax.Array | jax.ShapeDtypeStruct, kernel: jax.Array | jax.ShapeDtypeStruct) -> str:
    """The backend that ``rg_lru_gates`` uses for x ``[B, T, R]`` and kernels ``[N, K, K]``, those of one device."""
    how, fits = "as products", kernels.fits
    runs = kernel_runs("rg_lru_gates", backend, x, kernel, instead=_INSTEAD, how=how, fits=fits, on=("tpu",))
    return "pallas" if runs else _INSTEAD


def kernel_runs(
    operation: str,
    backend: str,
    x: jax.Array | jax.ShapeDtypeStruct,
    kernel: jax.Array | jax.ShapeDtypeStruct,
    *,
    instead: str,
    how: str,
    fits: Callable[[int, int, int], bool],
    on: tuple[str, ...],
) -> bool:
    """Whether the kernel of an operation with these gates runs, as ``backends.kernel_runs``; there is one ``on`` some
    platforms.

    ``fits``: whether VMEM has room, for R, K and the bytes of a number.
    """
    few, refusal = x.shape[1] <= matrix_states.FEW_TOKENS, functools.partial(_refusal, x, kernel, fits)
    return backends.lone_kernel_runs(operation, backend, few, x.shape, refusal, on=on, instead=instead, how=how)


def _refusal(
    x: jax.Array | jax.ShapeDtypeStruct,
    kernel: jax.Array | jax.ShapeDtypeStruct,
    fits: Callable[[int, int, int], bool],
    platform: str,
) -> str | None:
    """Why the kernel does not run, or None. Where it is interpreted, only what does not fit together is refused."""
    width, (count, block, _) = x.shape[2], kernel.shape
    if width != count * block:
        return f"the kernel needs whole blocks on each device, and {width} channels are no multiple of {block}"
    reason = backends.refused_dtype(platform, x.dtype)
    if reason is None and platform == "tpu" and not fits(width, block, x.dtype.itemsize):
        return f"the kernel has no room in VMEM for blocks of {block} channels among {width}"
    return reason


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x ``[B, T, N K]`` by the blocks ``[N, K, M]``: ``[B, T, N, M]`` in the dtype of x."""
    return dtypes.parameter_product("bthi,hij->bthj", x.reshape(*x.shape[:2], *kernel.shape[:2]), kernel)


def _by_products(x, recurrence_kernel, input_kernel, vectors, first):
    recurrence_bias, input_bias, rate = vectors

    def gate(kernel, bias):
        # Widened first: the gradient of the bias is then summed in this dtype.
        return jax.nn.sigmoid(product(x, kernel).reshape(x.shape).astype(bias.dtype) + bias[None, None])

    r, i = gate(recurrence_kernel, recurrence_bias), gate(input_kernel, input_bias)
    log_a = r * rate[None, None]
    one = jnp.ones((), log_a.dtype)
    weight = jnp.where(first[..., None], one, bounded_sqrt(-jnp.expm1(2 * log_a)))
    return jnp.exp(log_a), weight * (i * x.astype(log_a.dtype))


@jax.custom_vjp
def bounded_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with a slope of at most ``LARGEST_SLOPE``."""
    return jnp.sqrt(x)


def _bounded_sqrt_forward(x):
    root = jnp.sqrt(x)
    return root, root


def _bounded_sqrt_backward(root, cotangent):
    return (cotangent / jnp.maximum(2 * root, 1 / LARGEST_SLOPE),)


bounded_sqrt.defvjp(_bounded_sqrt_forward, _bounded_sqrt_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_kernel(x: jax.Array, both: jax.Array, vectors: jax.Array, first: jax.Array, target: Target):
    return kernels.forward(x, both, vectors, first, target=target)


def _by_kernel_forward(x, both, vectors, first, target):
    given = derivatives.once((x, both, vectors, first), _INSTEAD)
    return kernels.forward(*given, target=target), given


def _by_kernel_backward(target, given, cotangents):
    given, cotangents = derivatives.once((given, cotangents), _INSTEAD)
    return *kernels.gradient(*given, *cotangents, target=target), None


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def check_shapes(operation: str, x, recurrence_kernel, input_kernel, first, **vectors) -> None:
    """Raises ``UserError`` unless the arguments of ``rg_lru_gates`` fit each other; ``vectors``: ``[R]`` by name."""
    checks.axes(operation, "B T R", x=x)
    checks.numbers(operation, x=x)
    batch, length, width = x.shape
    axes = recurrence_kernel.shape
    if len(axes) != 3 or axes[1] != axes[2] or axes[0] * axes[1] != width:
        raise UserError(
            f"{operation}: recurrence_kernel is {axes}; for x {x.shape} it must be [N, K, K] with N K = {width}"
        )
    if input_kernel.shape != axes:
        raise UserError(
            f"{operation}: input_kernel {input_kernel.shape} does not have recurrence_kernel's shape {axes}"
        )
    for name, y in vectors.items():
        if y.shape != (width,):
            raise UserError(f"{operation}: {name} is {y.shape}, not [R] = {(width,)}")
    if first.shape != (batch, length) or first.dtype != bool:
        raise UserError(f"{operation}: first is {first.dtype} {first.shape}, not bool [B, T] = {(batch, length)}")
