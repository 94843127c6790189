"""The gates of the RG-LRU (De et al. 2024, arXiv:2402.19427): from activations to the recurrence's transition and input.

    r_t = sigmoid(W_a x_t + b_a),   i_t = sigmoid(W_x x_t + b_x),   a_t = exp(rate r_t),   u_t = sqrt(1 - a_t^2) (i_t x_t)

Nothing depends on another token. The products are small, and what is large are the arrays between them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, matrix_states
from jaxlinear.ops.backends import Form
from jaxlinear.ops.spec import TIME, Axes, Spec
from jaxlinear.pallas.parts import derivatives
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import gates as kernels
from jaxlinear.pallas.rg_lru.equations import LARGEST_SLOPE

_PLAIN = "products"


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
    backend: str | Form = "auto",
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
    if choose(x, recurrence_kernel, backend=backend).is_kernel:
        both = jnp.stack([recurrence_kernel, input_kernel])
        return _by_kernel(x, both, jnp.stack(vectors), first, backends.target())
    return _by_products(x, recurrence_kernel, input_kernel, vectors, first)


def choose(x: Any, recurrence_kernel: Any, *, backend: str | Form = "auto", **_: Any) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    return choose_with("rg_lru_gates", _PLAIN, x, recurrence_kernel, backend, kernels.fits, ("tpu",))


def choose_with(
    operation: str,
    plain: str,
    x: Any,
    kernel: Any,
    backend: str | Form,
    fits: Callable[[int, int, int], bool],
    on: tuple[str, ...],
    elsewhere: str | None = None,
) -> Form:
    """The form of an operation with these gates, whose kernel is ``on`` some platforms. ``fits``: whether VMEM has room,
    for R, K and the bytes of a number. ``elsewhere``: another reason for no kernel."""
    width, (count, block, _) = x.shape[2], kernel.shape

    def refusal(platform: str) -> str | None:
        if elsewhere is not None:
            return elsewhere
        if width != count * block:
            return f"the kernel needs whole blocks on each device, and {width} channels are no multiple of {block}"
        reason = backends.refused_dtype(platform, x.dtype)
        if reason is None and platform == "tpu" and not fits(width, block, x.dtype.itemsize):
            return f"the kernel has no room in VMEM for blocks of {block} channels among {width}"
        return reason

    few, forms = plain if x.shape[1] <= matrix_states.FEW_TOKENS else None, (plain, "pallas")
    shapes = [x.shape]
    return backends.choose(operation, backend, forms, plain=plain, few=few, shapes=shapes, refusal=refusal, on=on)


def axes(arrays: Mapping[str, Any], axis: str | None) -> dict[str, Axes]:
    """Of R by ``axis`` and of the N blocks by ``heads``."""
    return {
        "x": (*TIME, axis),
        **dict.fromkeys(("recurrence_kernel", "input_kernel"), ("heads",)),
        **dict.fromkeys(("recurrence_bias", "input_bias", "rate"), (axis,)),
        **dict.fromkeys(("first", "segment_ids"), TIME),
        "initial_state": ("batch", axis),
    }


RG_LRU_GATES = Spec(
    rg_lru_gates,
    choose,
    axes,
    results=("x", "x"),
    axis="recurrent",
    plain=_PLAIN,
    outputs=("transition", "input"),
    parameters=("recurrence_kernel", "input_kernel"),
)


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
    given = derivatives.once((x, both, vectors, first), _PLAIN)
    return kernels.forward(*given, target=target), given


def _by_kernel_backward(target, given, cotangents):
    given, cotangents = derivatives.once((given, cotangents), _PLAIN)
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
