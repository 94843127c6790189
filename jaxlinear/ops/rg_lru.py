"""The RG-LRU (De et al. 2024, arXiv:2402.19427): its gates (``rg_lru_gates``) and the recurrence that they drive.

    h_t = a_t h_{t-1} + u_t

As one kernel, neither a nor u is ever written, forward or backward. On GPU XLA computes the products with W_a and W_x.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, recurrence, segments
from jaxlinear.ops.diagonal import linear_recurrence
from jaxlinear.ops.diagonal_kernel import no_state
from jaxlinear.ops.rg_lru_gates import check_shapes, kernel_runs, product, rg_lru_gates
from jaxlinear.pallas import derivatives, rg_lru_gpu, rg_lru_tpu
from jaxlinear.pallas.target import Target

_INSTEAD = "separate"  # of the kernel, where it does not run


@calls.recorded
def rg_lru(
    x: jax.Array,
    recurrence_kernel: jax.Array,
    recurrence_bias: jax.Array,
    input_kernel: jax.Array,
    input_bias: jax.Array,
    rate: jax.Array,
    first: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The RG-LRU over ``[B, T, R]``.

    Args:
      x, recurrence_kernel, recurrence_bias, input_kernel, input_bias, rate, first: as in ``rg_lru_gates``.
      initial_state, segment_ids: ``[B, R]`` and ``[B, T]``, as in ``linear_recurrence``.
      backend: ``"separate"`` (``rg_lru_gates`` and ``linear_recurrence``, each by its own choice), ``"pallas"`` (one
        kernel for TPU and GPU, interpreted on CPU) or ``"auto"``: the kernel there for more than 8 tokens; where it does
        not run, that is logged once.

    Returns:
      h ``[B, T, R]`` and the last state ``[B, R]`` in float32 (float64 if x is).
    """
    x, recurrence_kernel, input_kernel = (jnp.asarray(y) for y in (x, recurrence_kernel, input_kernel))
    recurrence_bias, input_bias, rate, first = (jnp.asarray(y) for y in (recurrence_bias, input_bias, rate, first))
    given = x, recurrence_kernel, recurrence_bias, input_kernel, input_bias, rate, first
    if choose(backend, x, recurrence_kernel) == _INSTEAD:
        a, u = rg_lru_gates(*given)
        return linear_recurrence(a, u, initial_state, segment_ids=segment_ids)
    check_shapes(
        "rg_lru",
        x,
        recurrence_kernel,
        input_kernel,
        first,
        recurrence_bias=recurrence_bias,
        input_bias=input_bias,
        rate=rate,
    )
    segment_ids = checks.segment_ids("rg_lru", segment_ids, *x.shape[:2])
    starts = None if segment_ids is None else segments.starts(segment_ids)
    wide = dtypes.wide(x.dtype)
    state = no_state(x, x) if initial_state is None else jnp.asarray(initial_state).astype(wide)
    if state.shape != (x.shape[0], x.shape[2]):
        raise UserError(f"rg_lru: the initial state is {state.shape}, not [B, R] = {(x.shape[0], x.shape[2])}")
    vectors = jnp.stack([y.astype(wide) for y in (recurrence_bias, input_bias, rate)])
    target = backends.target()
    inputs: rg_lru_gpu.Inputs | rg_lru_tpu.Inputs
    if target.platform == "gpu":
        z = product(x, jnp.concatenate([recurrence_kernel, input_kernel], axis=2))
        inputs = rg_lru_gpu.Inputs(z, x, vectors, first, starts)
    else:
        inputs = rg_lru_tpu.Inputs(x, jnp.stack([recurrence_kernel, input_kernel]), vectors, first, starts)
    return _by_kernel(inputs, state, target)


def choose(backend: str, x: jax.Array | jax.ShapeDtypeStruct, kernel: jax.Array | jax.ShapeDtypeStruct) -> str:
    """The backend that ``rg_lru`` uses for x ``[B, T, R]`` and kernels ``[N, K, K]``, those of one device."""
    how = "as gates and a recurrence"
    fits, on = rg_lru_tpu.fits, backends.COMPILED
    runs = kernel_runs("rg_lru", backend, x, kernel, instead=_INSTEAD, how=how, fits=fits, on=on)
    return "pallas" if runs else _INSTEAD


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_kernel(inputs: rg_lru_gpu.Inputs | rg_lru_tpu.Inputs, state: jax.Array, target: Target):
    return _kernels(target).forward(inputs, state, target=target)


def _by_kernel_forward(inputs, state, target):
    given = derivatives.once((inputs, state), _INSTEAD)
    h, final = recurrence.named(_kernels(target).forward(*given, target=target))
    return (h, final), (given, h)


def _by_kernel_backward(target, residuals, cotangents):
    ((inputs, state), h), cotangents = derivatives.once((residuals, cotangents), _INSTEAD)
    *numbers, d_state = _kernels(target).gradient(inputs, state, h, *cotangents, target=target)
    return type(inputs)(*numbers, first=None, starts=None), d_state


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _kernels(target: Target):
    return rg_lru_gpu if target.platform == "gpu" else rg_lru_tpu
