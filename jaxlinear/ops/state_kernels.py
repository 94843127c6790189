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

NARROWEST, WIDEST = 16, 256  # K, and V of one kernel, where they are compiled


def value_pieces(width: int) -> int | None:
    """How many kernels share V: the columns of a state do not see each other. None where they cannot."""
    pieces = -(-width // WIDEST)
    return pieces if width % pieces == 0 else None


def run(kernels: ModuleType, inputs: Any, state: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """``kernels.forward``, differentiable. Where the gradient of the state alone is asked for, only that is computed."""
    return _run(kernels, inputs, state, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _run(kernels, inputs, state, options):
    return _forward(kernels, inputs, state, options, keep=False)[:2]


def _forward(kernels, inputs, state, options, *, keep):
    parts = zip(_of_pieces(inputs), _split(state), strict=True)
    o, final, before = zip(*(kernels.forward(*part, options, keep=keep) for part in parts), strict=True)
    return _joined(o), _joined(final), before


def _run_forward(kernels, inputs, state, options):
    only_state = not any(x.perturbed for x in inputs if x is not None)
    inputs, state = values((inputs, state))
    o, final, before = _forward(kernels, inputs, state, options, keep=not only_state)
    if only_state:
        return (o, final), (inputs, None)
    o, final, before = recurrence.named((o, final, before))
    return (o, final), (inputs, before)


def _run_backward(kernels, options, residuals, cotangents):
    inputs, before = residuals
    d_o, d_final = (jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in cotangents)
    pieces = _of_pieces(inputs)
    of_values = list(zip(_split(d_o, len(pieces)), _split(d_final, len(pieces)), strict=True))
    if before is None:
        found = [kernels.state_gradient(one, *d, options) for one, d in zip(pieces, of_values, strict=True)]
        return None, _joined(found)
    parts = zip(pieces, before, of_values, strict=True)
    d_inputs, d_state = zip(*(kernels.gradient(one, kept, *d, options) for one, kept, d in parts), strict=True)
    summed = jax.tree.map(_sum, *d_inputs) if len(pieces) > 1 else d_inputs[0]
    return summed._replace(v=_joined([one.v for one in d_inputs])), _joined(d_state)


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def summary(kernels: ModuleType, inputs: Any, dtype: np.dtype, options: Options) -> tuple[jax.Array, jax.Array]:
    """``kernels.summary``. It has no gradient: a run is differentiated by its outputs and the state after it."""
    transitions, states = zip(*(kernels.summary(one, dtype, options) for one in _of_pieces(inputs)), strict=True)
    return transitions[0], _joined(states)


def _summary_forward(kernels, inputs, dtype, options):
    return summary(kernels, inputs, dtype, options), None


def _summary_backward(kernels, dtype, options, residuals, cotangents):
    raise UserError("the map of a run has no gradient by the kernel; its outputs and the state after it have one")


summary.defvjp(_summary_forward, _summary_backward)


def _of_pieces(inputs):
    """The inputs with each piece of V."""
    return [inputs._replace(v=v) for v in _split(inputs.v)]


def _split(x: jax.Array, pieces: int | None = None) -> list[jax.Array]:
    """By its last axis, V."""
    pieces = pieces or value_pieces(x.shape[-1])
    assert pieces is not None
    return jnp.split(x, pieces, axis=-1) if pieces > 1 else [x]


def _joined(parts) -> jax.Array:
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _sum(*parts: jax.Array) -> jax.Array:
    """Of gradients of what all pieces share; summed in float32 at least."""
    wide = dtypes.wide(parts[0].dtype)
    return sum((x.astype(wide) for x in parts), start=jnp.zeros((), wide)).astype(parts[0].dtype)


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
