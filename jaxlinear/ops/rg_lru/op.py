"""The RG-LRU (De et al. 2024, arXiv:2402.19427): its gates (``rg_lru_gates``) and the recurrence that they drive.

    h_t = a_t h_{t-1} + u_t

As one kernel, neither a nor u is ever written, forward or backward. On GPU XLA computes the products with W_a and W_x.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, calls, checks, dtypes, protocol, segments
from jaxlinear.ops.backends import Form
from jaxlinear.ops.diagonal.family import no_state
from jaxlinear.ops.diagonal.op import LINEAR_RECURRENCE
from jaxlinear.ops.rg_lru.gates import RG_LRU_GATES, axes, check_shapes, choose_with, product
from jaxlinear.ops.spec import Arrays, Spec, directly
from jaxlinear.pallas.parts import derivatives
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import gpu as rg_lru_gpu
from jaxlinear.pallas.rg_lru import tpu as rg_lru_tpu

_PLAIN = "separate"


@functools.partial(calls.recorded, choose=lambda **given: choose(**given))
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
    backend: str | Form = "auto",
    call: Callable[[Spec], Callable[..., Any]] = directly,
) -> tuple[jax.Array, jax.Array]:
    """The RG-LRU over ``[B, T, R]``.

    Args:
      x, recurrence_kernel, recurrence_bias, input_kernel, input_bias, rate, first: as in ``rg_lru_gates``.
      initial_state, segment_ids: ``[B, R]`` and ``[B, T]``, as in ``linear_recurrence``.
      backend: ``"separate"`` (``rg_lru_gates`` and ``linear_recurrence``, each by its own choice), ``"pallas"`` (one
        kernel for TPU and GPU, interpreted on CPU) or ``"auto"``: the kernel there for more than 8 tokens; where it does
        not run, that is logged once.
      call: ``ops.spec.directly``.

    Returns:
      h ``[B, T, R]`` and the last state ``[B, R]`` in float32 (float64 if x is).
    """
    x, recurrence_kernel, input_kernel = (jnp.asarray(y) for y in (x, recurrence_kernel, input_kernel))
    recurrence_bias, input_bias, rate, first = (jnp.asarray(y) for y in (recurrence_bias, input_bias, rate, first))
    given = x, recurrence_kernel, recurrence_bias, input_kernel, input_bias, rate, first
    if not choose(x, recurrence_kernel, backend=backend).is_kernel:
        a, u = call(RG_LRU_GATES)(*given)
        return call(LINEAR_RECURRENCE)(a, u, initial_state, segment_ids=segment_ids)
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


def choose(x: Any, recurrence_kernel: Any, *, backend: str | Form = "auto", sharded: bool = False, **_: Any) -> Form:
    """The form for these arrays of one device (``ops.spec``)."""
    elsewhere = "the kernel needs whole rows, and mesh.sequence shards them" if sharded else None
    fits, on = rg_lru_tpu.fits, backends.COMPILED
    return choose_with("rg_lru", _PLAIN, x, recurrence_kernel, backend, fits, on, elsewhere)


def _complete(arrays: Arrays, form: Form) -> Arrays:
    return {"initial_state": no_state(arrays["x"], arrays["x"])} | arrays


RG_LRU = Spec(
    rg_lru,
    choose,
    axes,
    results=("x", "initial_state"),
    axis="recurrent",
    plain=_PLAIN,
    over_time="parts",
    complete=_complete,
    parameters=("recurrence_kernel", "input_kernel"),
    parts=("rg_lru_gates", "linear_recurrence"),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_kernel(inputs: rg_lru_gpu.Inputs | rg_lru_tpu.Inputs, state: jax.Array, target: Target):
    return _kernels(target).forward(inputs, state, target=target)


def _by_kernel_forward(inputs, state, target):
    given = derivatives.once((inputs, state), _PLAIN)
    h, final = protocol.named(_kernels(target).forward(*given, target=target))
    return (h, final), (given, h)


def _by_kernel_backward(target, residuals, cotangents):
    ((inputs, state), h), cotangents = derivatives.once((residuals, cotangents), _PLAIN)
    *numbers, d_state = _kernels(target).gradient(inputs, state, h, *cotangents, target=target)
    return type(inputs)(*numbers, first=None, starts=None), d_state


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _kernels(target: Target):
    return rg_lru_gpu if target.platform == "gpu" else rg_lru_tpu
