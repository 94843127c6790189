"""The selective scan by the kernels of ``jaxlinear.pallas.selective_scan``, with gradients, and when they do not run."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import custom_vjp_primal_tree_values as values

from jaxlinear.ops import backends, recurrence, selective_scan_maps
from jaxlinear.ops.selective_scan_maps import Inputs, SelectiveScanMaps
from jaxlinear.pallas import blocks, derivatives
from jaxlinear.pallas import selective_scan as kernels
from jaxlinear.pallas.target import Target

WIDEST = 128  # the largest N where kernels are compiled
_TAKEN = (np.dtype(np.float32), np.dtype(jnp.bfloat16))


def refusal(
    arrays: tuple[jax.Array, ...], channels: int, states: int, chunk_size: int | None, platform: str
) -> str | None:
    """Why the kernels do not run, or None. On other platforms than TPU and GPU they are interpreted, and take all but a
    chunk size. ``arrays``: x, dt, B, C and A, if there is one; ``channels``: those on one device; ``states``: N."""
    if chunk_size is not None:
        return f"the kernel chooses its own blocks and takes no chunk_size={chunk_size}"
    if platform not in backends.COMPILED:
        return None
    for x in arrays:
        if x.dtype not in _TAKEN:
            return f"the kernel takes {' and '.join(map(str, _TAKEN))}, not {x.dtype}"
    if states > WIDEST:
        return f"the kernel takes N up to {WIDEST}, not {states}"
    if platform == "tpu" and channels > (most := blocks.selective_scan_tpu_channels(states)):
        return (
            f"the kernel takes up to {most:,} channels of {states} numbers per device, the most that fit in VMEM, not "
            f"{channels:,}; mesh.tensor splits them"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def outputs(inputs: Inputs, A: jax.Array | None, state: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """``kernels.forward``, differentiable. If only the gradient of the state is asked for, only that is computed."""
    return _forward(inputs, A, state, target, keep=False)[:2]


def _forward(inputs, A, state, target, keep):
    x, dt, B, C, starts = inputs
    return kernels.forward(x, dt, A, B[:, :, 0], C[:, :, 0], state, starts, keep=keep, target=target)


def _outputs_forward(inputs, A, state, target):
    only_state = not any(x.perturbed for x in (*inputs[:4], A) if x is not None)
    given = derivatives.once(values((inputs, A, state)))
    y, final, before = _forward(*given, target, keep=not only_state)
    if not only_state:
        y, final, before = recurrence.named((y, final, before))
    return (y, final), (*given[:2], before)


def _outputs_backward(target, residuals, cotangents):
    cotangents = derivatives.as_arrays(cotangents)
    (inputs, A, before), (d_y, d_final) = derivatives.once((residuals, cotangents))
    x, dt, B, C, starts = inputs
    B, C = B[:, :, 0], C[:, :, 0]
    if before is None:
        return None, None, kernels.state_gradient(dt, A, B, C, starts, d_y, d_final, target=target)
    d_x, d_dt, d_A, d_B, d_C, d_state = kernels.gradient(x, dt, A, B, C, starts, before, d_y, d_final, target=target)
    return Inputs(d_x, d_dt, d_B[:, :, None], d_C[:, :, None], None), d_A, d_state


outputs.defvjp(_outputs_forward, _outputs_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def summary(inputs: Inputs, A: jax.Array | None, target: Target) -> tuple[jax.Array, jax.Array]:
    """M and C of a run. It has no gradient: a run is differentiated by its outputs and the state after it."""
    x, dt, B, C, starts = inputs
    none = selective_scan_maps.no_state(x, dt, A, B, C)
    run = functools.partial(kernels.summary, target=target)
    added = run(x, dt, A, B[:, :, 0], none, starts)
    if A is not None:
        return selective_scan_maps.kept(inputs, A, none.dtype), added
    return run(jnp.zeros_like(x), dt, A, B[:, :, 0], none + 1, starts), added


def _summary_forward(inputs, A, target):
    return summary(inputs, A, target), None


summary.defvjp(_summary_forward, derivatives.refuse_that_of_a_map)


class _Given(NamedTuple):
    inputs: Inputs
    A: jax.Array | None


@dataclasses.dataclass(frozen=True)
class SelectiveScanKernel(SelectiveScanMaps):
    """The family ``selective_scan.SelectiveScan`` by the kernel.

    A run is just its inputs. Its map takes one pass over them, which writes nothing as long as the run; its outputs take
    another pass, once the state before the run is known.
    """

    target: Target

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> _Given:
        return _Given(inputs, constants)

    def summarise(self, run: _Given) -> tuple[jax.Array, jax.Array]:
        return summary(*run, self.target)

    def apply(self, run: _Given, state: jax.Array) -> jax.Array:
        return self.through(run, state)[0]

    def through(self, run: _Given, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return outputs(*run, state, self.target)
