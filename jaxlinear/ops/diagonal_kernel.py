"""The diagonal recurrence by the kernels of ``jaxlinear.pallas.scan``, with gradients, and when they do not run.

a and x are both real or both complex, each in its own dtype; states are in the dtype to compute in.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import custom_vjp_primal_tree_values as values

from jaxlinear.ops import backends, dtypes, recurrence
from jaxlinear.ops.diagonal_maps import DiagonalMaps, Power, Transition
from jaxlinear.pallas import derivatives
from jaxlinear.pallas import scan as kernels
from jaxlinear.pallas.target import Target

_TWICE = "associative"  # the backend that has gradients of gradients


def refusal(a_dtype, x_dtype, compute_dtype, platform: str) -> str | None:
    """Why the kernels do not run, or None. Where they are interpreted rather than compiled, nothing is refused."""
    if platform not in backends.COMPILED:
        return None
    if compute_dtype not in (np.dtype(np.float32), np.dtype(np.complex64)):
        return f"the kernel computes in float32 or complex64, not in {compute_dtype}"
    allowed = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.complex64))
    for dtype in (a_dtype, x_dtype):
        if dtype not in allowed:
            return f"the kernel takes float32, bfloat16 and complex64, not {dtype}"
    return None


def of_one_kind(a: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as complex if either is."""
    if jnp.iscomplexobj(a) == jnp.iscomplexobj(x):
        return a, x
    wide = dtypes.wide(a.dtype, x.dtype)
    return a.astype(wide), x.astype(wide)


def no_state(a: jax.Array, x: jax.Array) -> jax.Array:
    """Zeros ``[B, ...]`` in the dtype of states."""
    return jnp.zeros_like(x, shape=(x.shape[0], *x.shape[2:]), dtype=dtypes.wide(a.dtype, x.dtype))


def scan(
    a: jax.Array, x: jax.Array, state: jax.Array, starts: jax.Array | None, reverse: bool, target: Target
) -> tuple[jax.Array, jax.Array]:
    """``kernels.forward``, differentiable. If only the gradient of the state is asked for, only that is computed."""
    return _scan(a, x, state, starts, reverse, target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _scan(a, x, state, starts, reverse, target):
    return kernels.forward(a, x, state, starts, reverse=reverse, target=target)


def _scan_forward(a, x, state, starts, reverse, target):
    only_state = not (a.perturbed or x.perturbed)
    a, x, state, starts = values((a, x, state, starts))
    given = derivatives.once((a, x, state, starts), _TWICE)
    h, final = kernels.forward(*given, reverse=reverse, target=target)
    if only_state:
        return (h, final), (a, None, state, starts)
    h, final = recurrence.named((h, final))
    return (h, final), (a, h, state, starts)


def _scan_backward(reverse, target, residuals, cotangents):
    cotangents = derivatives.as_arrays(cotangents)
    (a, h, state, starts), (d_h, d_final) = derivatives.once((residuals, cotangents), _TWICE)
    if h is None:
        return None, None, kernels.state_gradient(a, d_h, d_final, starts, reverse=reverse, target=target), None
    d_a, d_x, d_state = kernels.gradient(a, h, state, starts, d_h, d_final, reverse=reverse, target=target)
    return d_a, d_x, d_state, None


_scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def summary(
    a: jax.Array, x: jax.Array, state: jax.Array, starts: jax.Array | None, target: Target
) -> tuple[jax.Array, jax.Array]:
    """``kernels.summary``. It has no gradient: a run is differentiated by its outputs and the state after it."""
    return kernels.summary(a, x, state, starts, target=target)


def _summary_forward(a, x, state, starts, target):
    return kernels.summary(a, x, state, starts, target=target), None


summary.defvjp(_summary_forward, derivatives.refuse_that_of_a_map)


class _Given(NamedTuple):
    a: jax.Array  # [B, T, ...] or [...]
    x: jax.Array  # [B, T, ...]
    starts: jax.Array | None  # [B, T]


@dataclasses.dataclass(frozen=True)
class DiagonalKernel(DiagonalMaps):
    """The family ``diagonal.Diagonal`` by the kernel, in the dtypes of a and x.

    A run is just its inputs. Its map takes one pass over them, which writes nothing as long as the run; its outputs take
    another pass, once the state before the run is known.
    """

    target: Target

    def prepare(self, inputs, constants) -> _Given:
        a, x, starts = inputs
        return _Given(*of_one_kind(constants if a is None else a, x), starts)

    def summarise(self, run: _Given) -> tuple[Transition, jax.Array]:
        a, x, starts = run
        none = no_state(a, x)
        product, final = summary(a, x, none, starts, self.target)
        if a.ndim == x.ndim:
            return product, final
        kept = jnp.ones_like(none, shape=(x.shape[0],))
        if starts is not None:
            kept = jnp.where(jnp.any(starts, axis=1), jnp.zeros_like(kept), kept)
        return Power(kept, jnp.broadcast_to(lax.integer_pow(a.astype(none.dtype), x.shape[1]), none.shape)), final

    def apply(self, run: _Given, state: jax.Array) -> jax.Array:
        """h ``[B, T, ...]`` in the dtype of x."""
        return self.through(run, state)[0]

    def through(self, run: _Given, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return scan(run.a, run.x, state, run.starts, False, self.target)
