"""Linear attention by the kernels of ``jaxlinear.pallas.linear_attention``, with gradients, and where they do not run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.custom_derivatives import custom_vjp_primal_tree_values as values

from jaxlinear.errors import UserError
from jaxlinear.ops import backends, dtypes, recurrence
from jaxlinear.ops.linear_attention_maps import Inputs, LinearAttentionMaps
from jaxlinear.pallas import blocks
from jaxlinear.pallas import linear_attention as kernels
from jaxlinear.pallas.target import Target

_WIDTHS = 16, 256


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, chunk_size: int | None, platform: str) -> str | None:
    """Why the kernels do not run, or None. On other platforms they are interpreted, and run whatever these do but chunks
    that are no power of two."""
    compiled = platform in backends.COMPILED
    least, most = blocks.CHUNKS.get(platform, (8, 256))
    if chunk_size is not None and (chunk_size.bit_count() != 1 or not least <= chunk_size <= most):
        return f"the kernel takes chunks of a power of two from {least} to {most} tokens, not of {chunk_size}"
    if not compiled:
        return None
    for x in (q, k, v):
        if x.dtype not in (np.dtype(np.float32), np.dtype(jnp.bfloat16)):
            return f"the kernel takes float32 and bfloat16, not {x.dtype}"
    heads, widths = q.shape[2], (q.shape[3], v.shape[3])
    for name, width in zip(("K", "V"), widths, strict=True):
        if not _WIDTHS[0] <= width <= _WIDTHS[1]:
            return f"the kernel takes K and V from {_WIDTHS[0]} to {_WIDTHS[1]}, not {name} = {width}"
    if platform == "tpu" and blocks.heads_of_block(heads, widths, 0) is None:
        return (
            f"the kernel takes at most {blocks.HEADS} heads together, and of {heads} heads with K, V = {widths} more are "
            "needed to fill registers of 128 lanes; multiples of 16 need fewer"
        )
    if platform == "gpu":
        return "the kernel is for TPU"
    return None


def run(inputs: kernels.Inputs, state: jax.Array, options: kernels.Options) -> tuple[jax.Array, jax.Array]:
    """``kernels.forward``, differentiable. Where the gradient of the state alone is asked for, only that is computed."""
    return _run(inputs, state, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _run(inputs, state, options):
    return kernels.forward(inputs, state, options)[:2]


def _run_forward(inputs, state, options):
    only_state = not any(x.perturbed for x in inputs if x is not None)
    inputs, state = values((inputs, state))
    o, final, before = kernels.forward(inputs, state, options, keep=not only_state)
    if only_state:
        return (o, final), (inputs, None)
    o, final, before = recurrence.named((o, final, before))
    return (o, final), (inputs, before)


def _run_backward(options, residuals, cotangents):
    inputs, before = residuals
    d_o, d_final = (jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in cotangents)
    if before is None:
        return None, kernels.state_gradient(inputs, d_o, d_final, options)
    return kernels.gradient(inputs, before, d_o, d_final, options)


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def summary(inputs: kernels.Inputs, dtype: np.dtype, options: kernels.Options) -> tuple[jax.Array, jax.Array]:
    """``kernels.summary``. It has no gradient: a run is differentiated by its outputs and the state after it."""
    return kernels.summary(inputs, dtype, options)


def _summary_forward(inputs, dtype, options):
    return kernels.summary(inputs, dtype, options), None


def _summary_backward(dtype, options, residuals, cotangents):
    raise UserError("the map of a run has no gradient by the kernel; its outputs and the state after it have one")


summary.defvjp(_summary_forward, _summary_backward)


@dataclasses.dataclass(frozen=True)
class LinearAttentionKernel(LinearAttentionMaps):
    """The family ``linear_attention.LinearAttention`` by the kernel.

    A run is its inputs: its map is one pass over keys, values and decays in which nothing as long as the run is written,
    and its outputs are one more, from the state that then is there. ``chunk``: tokens of a chunk, or None.
    """

    scale: float
    chunk: int | None
    target: Target

    @property
    def _options(self) -> kernels.Options:
        return kernels.Options(self.scale, self.chunk, self.target)

    def prepare(self, inputs: Inputs, constants: jax.Array | None) -> kernels.Inputs:
        q, k, v, log_decay, starts, _ = inputs
        narrow = functools.reduce(np.promote_types, (q.dtype, k.dtype, v.dtype))
        log_decay = log_decay if constants is None else constants
        return kernels.Inputs(q.astype(narrow), k.astype(narrow), v.astype(narrow), log_decay, starts)

    def summarise(self, run: kernels.Inputs) -> tuple[jax.Array, jax.Array]:
        return summary(run, dtypes.wide(run.q.dtype), self._options)

    def apply(self, run_: kernels.Inputs, state: jax.Array) -> jax.Array:
        """o ``[B, T, H, V]`` in the dtype of the products."""
        return self.through(run_, state)[0]

    def through(self, run_: kernels.Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run(run_, state, self._options)
