"""Kernels of recurrences with matrix states, as families and with gradients: what all such modules of kernels share.

Such a module (``pallas.delta_rule``) defines ``forward``, ``summary``, ``gradient`` and ``state_gradient`` on ``Inputs``
and ``Options``.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import custom_vjp_primal_tree_values as values

from jaxlinear.ops import backends, dtypes, protocol
from jaxlinear.pallas.parts import derivatives
from jaxlinear.pallas.parts.target import Target

# The limits of K, and of V per kernel, where kernels are compiled; in bfloat16 V may be twice as wide. Kernels that share V
# each recompute what follows from the keys.
NARROWEST, WIDEST, WIDEST_VALUES = 16, 256, 512
_TAKEN = {"tpu": (np.dtype(np.float32), np.dtype(jnp.bfloat16)), "gpu": (np.dtype(jnp.bfloat16),)}


def refusal(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chunk_size: int | None,
    platform: str,
    *,
    chunks: tuple[int, int],
    of_heads: Callable[[int, tuple[int, ...], int], str | None],
) -> str | None:
    """Why kernels do not run, or None. On other platforms than TPU and GPU they are interpreted, and the only limit is on
    the size of chunks. On GPU, float32 products would take more registers than there are.

    ``chunks``: the fewest and the most tokens per chunk on this platform.
    ``of_heads(H, (K, V per kernel), bytes per number)``: why such heads do not fit on TPU, or None; the widths are V alone
    if heads share queries and keys.
    """
    least, most = chunks
    if chunk_size is not None and (int(chunk_size).bit_count() != 1 or not least <= chunk_size <= most):
        sizes = f"{least} tokens" if least == most else f"a power of two from {least} to {most} tokens"
        return f"the kernel takes chunks of {sizes}, not of {chunk_size}"
    if platform not in backends.COMPILED:
        return None
    taken = _TAKEN[platform]
    for x in (q, k, v):
        if x.dtype not in taken:
            return f"the kernel takes {' and '.join(map(str, taken))}, not {x.dtype}"
    heads, keys, values = v.shape[2], q.shape[3], v.shape[3]
    wrong = f"K = {keys}" if not NARROWEST <= keys <= WIDEST else f"V = {values}" if values < NARROWEST else None
    if wrong:
        return f"the kernel takes K from {NARROWEST} to {WIDEST} and V of at least {NARROWEST}, not {wrong}"
    size = product_bytes(q, k, v)
    pieces = value_pieces(values, size)
    if pieces is None:
        return (
            f"the kernel takes V in equal parts of at most {_widest(size)}, and V = {values} cannot be split that way"
        )
    widths = (keys, values // pieces) if q.shape[2] == heads else (values // pieces,)
    return of_heads(heads, widths, size) if platform == "tpu" else None


def value_pieces(width: int, size: int) -> int | None:
    """How many kernels share V, for numbers of ``size`` bytes: the columns of a state are independent. None if they cannot
    share it."""
    fewest = -(-width // _widest(size))
    return next((pieces for pieces in range(fewest, 2 * fewest + 1) if width % pieces == 0), None)


def _widest(size: int) -> int:
    return WIDEST_VALUES if size == 2 else WIDEST


def product_bytes(*arrays: jax.Array) -> int:
    """Bytes per number in the dtype in which arrays are multiplied (``dtypes.narrow``)."""
    return dtypes.narrow(*(x.dtype for x in arrays)).itemsize


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def outputs(kernels: ModuleType, inputs: Any, state: jax.Array, options: Any) -> tuple[jax.Array, jax.Array]:
    """``kernels.forward``, differentiable. If only the gradient of the state is asked for, only that is computed."""
    return _by_pieces(kernels, inputs, state, options, keep=False)[:2]


def _by_pieces(kernels, inputs, state, options, *, keep):
    pieces = _of_pieces(inputs)
    parts = zip(pieces, _split(state, len(pieces)), strict=True)
    o, final, before = zip(*(kernels.forward(*part, options, keep=keep) for part in parts), strict=True)
    return _joined(o), _joined(final), before


def _outputs_forward(kernels, inputs, state, options):
    only_state = not any(x.perturbed for x in inputs if x is not None)
    inputs, state = values((inputs, state))
    given = derivatives.once((inputs, state))
    o, final, before = _by_pieces(kernels, *given, options, keep=not only_state)
    if only_state:
        return (o, final), (inputs, None)
    o, final, before = protocol.named((o, final, before))
    return (o, final), (inputs, before)


def _outputs_backward(kernels, options, residuals, cotangents):
    cotangents = derivatives.as_arrays(cotangents)
    (inputs, before), (d_o, d_final) = derivatives.once((residuals, cotangents))
    pieces = _of_pieces(inputs)
    of_values = list(zip(_split(d_o, len(pieces)), _split(d_final, len(pieces)), strict=True))
    if before is None:
        found = [kernels.state_gradient(one, *d, options) for one, d in zip(pieces, of_values, strict=True)]
        return None, _joined(found)
    parts = zip(pieces, before, of_values, strict=True)
    d_inputs, d_state = zip(*(kernels.gradient(one, kept, *d, options) for one, kept, d in parts), strict=True)
    summed = jax.tree.map(_sum, *d_inputs) if len(pieces) > 1 else d_inputs[0]
    return summed._replace(v=_joined([one.v for one in d_inputs])), _joined(d_state)


outputs.defvjp(_outputs_forward, _outputs_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3))
def summary(kernels: ModuleType, inputs: Any, dtype: np.dtype, options: Any) -> tuple[jax.Array, jax.Array]:
    """``kernels.summary``. It has no gradient: a run is differentiated by its outputs and the state after it."""
    transitions, states = zip(*(kernels.summary(one, dtype, options) for one in _of_pieces(inputs)), strict=True)
    return transitions[0], _joined(states)


def _summary_forward(kernels, inputs, dtype, options):
    return summary(kernels, inputs, dtype, options), None


summary.defvjp(_summary_forward, derivatives.refuse_that_of_a_map)


def _of_pieces(inputs):
    """The inputs once for each piece of V."""
    pieces = value_pieces(inputs.v.shape[-1], product_bytes(inputs.q, inputs.k, inputs.v))
    assert pieces is not None
    return [inputs._replace(v=v) for v in _split(inputs.v, pieces)]


def _split(x: jax.Array, pieces: int) -> list[jax.Array]:
    """Splits along the last axis, V."""
    return jnp.split(x, pieces, axis=-1) if pieces > 1 else [x]


def _joined(parts) -> jax.Array:
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _sum(*parts: jax.Array) -> jax.Array:
    """The sum of the gradients of what all pieces share, in float32 at least."""
    wide = dtypes.wide(parts[0].dtype)
    return sum((x.astype(wide) for x in parts), start=jnp.zeros((), wide)).astype(parts[0].dtype)


@dataclasses.dataclass(frozen=True)
class StateKernels(protocol.Family):
    """A family by its kernels. A run is just its inputs. Its map takes one pass over them, which writes nothing as long as
    the run; its outputs take another pass, once the state before the run is known. ``chunk``: tokens per chunk, or None."""

    KERNELS: ClassVar[ModuleType]

    scale: float
    chunk: int | None
    target: Target

    @property
    def _options(self) -> Any:
        return self.KERNELS.Options(self.scale, None if self.chunk is None else int(self.chunk), self.target)

    def summarise(self, run: Any) -> tuple[jax.Array, jax.Array]:
        return summary(self.KERNELS, run, dtypes.wide(run.q.dtype), self._options)

    def apply(self, run: Any, state: jax.Array) -> jax.Array:
        """o ``[B, T, H, V]`` in the dtype of the products."""
        return self.through(run, state)[0]

    def through(self, run: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return outputs(self.KERNELS, run, state, self._options)
