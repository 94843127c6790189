"""Kernels of recurrences with matrix states, as families and with gradients: what is the same for each module of kernels.

Such a module (``pallas.delta_rule``) has ``forward``, ``summary``, ``gradient`` and ``state_gradient``, of ``Inputs``.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.custom_derivatives import custom_vjp_primal_tree_values as values

from jaxlinear.errors import UserError
from jaxlinear.ops import dtypes, recurrence
from jaxlinear.pallas.linear_attention import Options
from jaxlinear.pallas.target import Target


def run(kernels: ModuleType, inputs: Any, state: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """``kernels.forward``, differentiable. Where the gradient of the state alone is asked for, only that is computed."""
    return _run(kernels, inputs, state, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _run(kernels, inputs, state, options):
    return kernels.forward(inputs, state, options)[:2]


def _run_forward(kernels, inputs, state, options):
    only_state = not any(x.perturbed for x in inputs if x is not None)
    inputs, state = values((inputs, state))
    o, final, before = kernels.forward(inputs, state, options, keep=not only_state)
    if only_state:
        return (o, final), (inputs, None)
    o, final, before = recurrence.named((o, final, before))
    return (o, final), (inputs, before)


def _run_backward(kernels, options, residuals, cotangents):
    inputs, before = residuals
    d_o, d_final = (jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in cotangents)
    if before is None:
        return None, kernels.state_gradient(inputs, d_o, d_final, options)
    return kernels.gradient(inputs, before, d_o, d_final, options)


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def summary(kernels: ModuleType, inputs: Any, dtype: np.dtype, options: Options) -> tuple[jax.Array, jax.Array]:
    """``kernels.summary``. It has no gradient: a run is differentiated by its outputs and the state after it."""
    return kernels.summary(inputs, dtype, options)


def _summary_forward(kernels, inputs, dtype, options):
    return kernels.summary(inputs, dtype, options), None


def _summary_backward(kernels, dtype, options, residuals, cotangents):
    raise UserError("the map of a run has no gradient by the kernel; its outputs and the state after it have one")


summary.defvjp(_summary_forward, _summary_backward)


@dataclasses.dataclass(frozen=True)
class StateKernels(recurrence.Family):
    """A family by its kernels. A run is its inputs: its map is one pass over them in which nothing as long as the run is
    written, and its outputs are one more, from the state that then is there. ``chunk``: tokens of a chunk, or None."""

    KERNELS: ClassVar[ModuleType]

    scale: float
    chunk: int | None
    target: Target

    @property
    def _options(self) -> Options:
        return Options(self.scale, self.chunk, self.target)

    def summarise(self, run: Any) -> tuple[jax.Array, jax.Array]:
        return summary(self.KERNELS, run, dtypes.wide(run.q.dtype), self._options)

    def apply(self, run: Any, state: jax.Array) -> jax.Array:
        """o ``[B, T, H, V]`` in the dtype of the products."""
        return self.through(run, state)[0]

    def through(self, run_: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run(self.KERNELS, run_, state, self._options)
