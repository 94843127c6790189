"""Diagonal recurrences as a family, M elementwise: by a loop or a parallel prefix, and by its kernels."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import custom_vjp_primal_tree_values as values

from jaxlinear.ops import dtypes, protocol
from jaxlinear.ops.diagonal import loops
from jaxlinear.pallas.parts import derivatives
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.scan import kernel as kernels


class Power(NamedTuple):
    """M of a transition that is constant in time: a^n for a run of n tokens, but zero if a document ends in the run."""

    kept: jax.Array  # [B], 1 where it is a^n, else 0
    power: jax.Array  # [B or 1, ...]


Transition = jax.Array | Power


@dataclasses.dataclass(frozen=True)
class DiagonalMaps(protocol.Family):
    """The part of the family that concerns maps."""

    def compose(self, earlier, later) -> tuple[Transition, jax.Array]:
        return jax.tree.map(jnp.multiply, later[0], earlier[0]), self.advance(later, earlier[1])

    def advance(self, summary, state: jax.Array) -> jax.Array:
        transition, added = summary
        if isinstance(transition, Power):
            transition = _of_power(transition)
        return transition * state + added

    def pack(self, transition: Transition) -> jax.Array:
        return transition.kept if isinstance(transition, Power) else transition

    def unpack(self, packed: jax.Array, constants: jax.Array | None, length: int) -> Transition:
        if constants is None:
            return packed
        return Power(packed, lax.integer_pow(constants.astype(packed.dtype), length)[None])


def _of_power(transition: Power) -> jax.Array:
    kept = jnp.expand_dims(transition.kept.astype(bool), tuple(range(1, transition.power.ndim)))
    return jnp.where(kept, transition.power, jnp.zeros((), transition.power.dtype))


class _Run(NamedTuple):
    h: jax.Array  # [B, T, ...], from no state
    decay: jax.Array  # [B or 1, T, ...], of the state before the run
    keep: jax.Array | None  # [B, T or 1], false where that state's document has ended; None if the decay varies
    whole: Transition  # M


@dataclasses.dataclass(frozen=True)
class Diagonal(DiagonalMaps):
    """The family (``protocol.Family``) of these recurrences, for when time is split. Its outputs are h.

    ``inputs`` are ``(a, x, starts)``: a and x ``[B, T, ...]``; ``starts`` ``[B, T]`` bool, true where the state begins anew
    (possibly at the first token), or None if it never does. For a transition that is constant in time, a is None there and
    ``constants`` is a, with the axes of the state except B; M is then a ``Power``, of which only ``kept`` is sent to other
    devices.

    Padding with zeros is not neutral: a = 0 forgets, and a^n counts every token. So the pieces must divide T. On one device
    nothing is split: the loop and the prefix are already linear in T.
    """

    backend: str = "auto"

    def prepare(self, inputs, constants) -> "_Run":
        a, x, starts = inputs
        constant = a is None
        a = constants if constant else a
        x = x.astype(dtypes.wide(a.dtype, x.dtype))
        h, _ = loops.run(a, x, jnp.zeros_like(x[:, 0]), starts, False, self.backend)
        # M is computed by itself, not taken as the last of the products below, so that those can wait, or run while the map
        # is in transit.
        # What scales the state before the run is purely a product of transitions: if those are constant, it is the same for
        # all rows until the first document of a row ends.
        if not constant:
            decay, _ = loops.run(a, jnp.zeros_like(x), jnp.ones_like(x[:, 0]), starts, False, self.backend)
            whole = jnp.prod(loops.kept(a.astype(x.dtype), None if starts is None else ~starts), axis=1)
            return _Run(h, decay, None, whole)
        decay, _ = loops.run(a, jnp.zeros_like(x[:1]), jnp.ones_like(x[:1, 0]), None, False, self.backend)
        keep = jnp.ones_like(x, shape=(x.shape[0], 1), dtype=bool)
        if starts is not None:
            keep = jnp.cumsum(starts, axis=1, dtype=jnp.int32) == 0
        power = jnp.broadcast_to(lax.integer_pow(a.astype(x.dtype), x.shape[1]), h[:, -1].shape)
        return _Run(h, decay, keep, Power(keep[:, -1].astype(x.dtype), power))

    def summarise(self, run: "_Run") -> tuple[Transition, jax.Array]:
        return run.whole, run.h[:, -1]

    def apply(self, run: "_Run", state: jax.Array) -> jax.Array:
        """h ``[B, T, ...]`` in float32 or complex64 (float64 or complex128 when given those)."""
        return loops.kept(run.decay * state[:, None], run.keep) + run.h

    def through(self, run: "_Run", state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The outputs are the states."""
        h = self.apply(run, state)
        return h, h[:, -1]


_TWICE = "associative"  # the backend that has gradients of gradients


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
    h, final = protocol.named((h, final))
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
