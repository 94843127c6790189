"""Diagonal recurrences as a family, M elementwise: by a loop or a parallel prefix, and by its kernels."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear.ops import dtypes, protocol
from jaxlinear.ops.diagonal import loops
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
            transition = _from_power(transition)
        return transition * state + added

    def pack(self, transition: Transition) -> jax.Array:
        return transition.kept if isinstance(transition, Power) else transition

    def unpack(self, packed: jax.Array, constants: jax.Array | None, length: int) -> Transition:
        if constants is None:
            return packed
        return Power(packed, lax.integer_pow(constants.astype(packed.dtype), length)[None])


def _from_power(transition: Power) -> jax.Array:
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


def promoted_kind(a: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as complex if either is."""
    if jnp.iscomplexobj(a) == jnp.iscomplexobj(x):
        return a, x
    wide = dtypes.wide(a.dtype, x.dtype)
    return a.astype(wide), x.astype(wide)


def no_state(a: jax.Array, x: jax.Array) -> jax.Array:
    """Zeros ``[B, ...]`` in the dtype of states."""
    return jnp.zeros_like(x, shape=(x.shape[0], *x.shape[2:]), dtype=dtypes.wide(a.dtype, x.dtype))


class _Given(NamedTuple):
    a: jax.Array  # [B, T, ...] or [...]
    x: jax.Array  # [B, T, ...]
    starts: jax.Array | None  # [B, T]


@dataclasses.dataclass(frozen=True)
class DiagonalKernel(protocol.Kernels, DiagonalMaps):
    """The family ``Diagonal`` by the kernels, in the dtypes of a and x. ``reverse``: time runs from the last token to the
    first."""

    TWICE: ClassVar[str] = "associative"

    target: Target
    reverse: bool = False

    def prepare(self, inputs, constants) -> _Given:
        a, x, starts = inputs
        return _Given(*promoted_kind(constants if a is None else a, x), starts)

    def forward(self, run: _Given, state: jax.Array, *, keep: bool):
        """h ``[B, T, ...]`` in the dtype of x."""
        h, final = kernels.forward(*run[:2], state, run.starts, reverse=self.reverse, target=self.target)
        return h, final, None

    def kept(self, run: _Given, state: jax.Array, outputs: jax.Array, before: None) -> tuple[_Given, jax.Array]:
        """h in place of x, which the gradients do not need, and the state before the first h."""
        return run._replace(x=outputs), state

    def gradient(self, run: _Given, before: jax.Array, d_outputs: jax.Array, d_final: jax.Array):
        d_a, d_x, d_state = kernels.gradient(
            run.a, run.x, before, run.starts, d_outputs, d_final, reverse=self.reverse, target=self.target
        )
        return _Given(d_a, d_x, None), d_state

    def state_gradient(self, run: _Given, d_outputs: jax.Array, d_final: jax.Array) -> jax.Array:
        return kernels.state_gradient(run.a, d_outputs, d_final, run.starts, reverse=self.reverse, target=self.target)

    def summary(self, run: _Given) -> tuple[Transition, jax.Array]:
        a, x, starts = run
        none = no_state(a, x)
        product, final = kernels.summary(a, x, none, starts, target=self.target)
        if a.ndim == x.ndim:
            return product, final
        kept = jnp.ones_like(none, shape=(x.shape[0],))
        if starts is not None:
            kept = jnp.where(jnp.any(starts, axis=1), jnp.zeros_like(kept), kept)
        return Power(kept, jnp.broadcast_to(lax.integer_pow(a.astype(none.dtype), x.shape[1]), none.shape)), final
