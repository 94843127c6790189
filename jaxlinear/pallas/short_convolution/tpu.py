"""The short convolution for TPU, which goes through time in blocks, backward from the last to the first. Within a block the
channels are taken a register at a time.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts import memory
from jaxlinear.pallas.parts.lanes import LANES, SUBLANES, fill
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.short_convolution import blocks
from jaxlinear.pallas.short_convolution.kernel import After, Inputs

_LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    length: int  # T
    channels: int  # D
    width: int  # taps
    after: After
    time: int  # tokens of a block
    group: int  # channels of a block
    backward: bool

    @property
    def steps(self) -> int:
        return pl.cdiv(self.length, self.time)


def refusal(channels: int, width: int, head: int) -> str | None:
    """Why the kernel does not take so many channels, taps, or channels of a head, or None."""
    if not 2 <= width <= SUBLANES + 1:
        return f"the kernel takes 2 to {SUBLANES + 1} taps, not {width}"
    if _block(channels, head) is None:
        return f"the kernel has no room in VMEM for {channels} channels, which no multiple of 128 and of a head divides"
    return None


def forward(inputs: Inputs, after: After, target: Target) -> jax.Array:
    """y or u, like x."""
    plan = _plan(inputs, after, backward=False)
    (y,) = _call(plan, inputs, None, target)
    return y[:, : plan.length]


def gradient(inputs: Inputs, d_y: jax.Array, after: After, target: Target) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of x, weights and state, from that of ``forward``'s output."""
    plan = _plan(inputs, after, backward=True)
    d_x, sums, d_state = _call(plan, inputs, d_y, target)
    sums = jnp.sum(sums.reshape(len(d_y), plan.width + 1, SUBLANES, -1), axis=(0, 2))
    return d_x[:, : plan.length], sums, d_state[:, SUBLANES + 1 - plan.width :].astype(inputs.state.dtype)


def _plan(inputs: Inputs, after: After, *, backward: bool) -> Plan:
    _, length, channels = inputs.x.shape
    block = _block(channels, after.head)
    assert block is not None
    time, group = block
    return Plan(length, channels, inputs.width, after, min(time, -(-length // LANES) * LANES), group, backward)


def _block(channels: int, head: int) -> tuple[int, int] | None:
    """Tokens and channels of a block, which has whole registers and whole heads; None if VMEM has no room for any."""
    together, group = math.lcm(LANES, head or 1), channels
    if channels % together == 0:
        counts = range(1, channels // together + 1)
        fitting = (n * together for n in counts if channels // together % n == 0)
        group = max((n for n in fitting if n <= blocks.TPU_CHANNELS), default=together)
    fitting = (time for time in blocks.TPU_TIME if time * group <= blocks.TPU_NUMBERS)
    time = next(fitting, None)
    return None if time is None else (time, group)


def _call(plan: Plan, given: Inputs, d_y: Any, target: Target) -> list[jax.Array]:
    """The outputs of the kernel for whole blocks of time. Tokens after T are zeros, and so are their gradients."""
    wide, missing, halo = given.weights.dtype, plan.steps * plan.time - plan.length, SUBLANES + 1 - plan.width
    in_blocks = lambda y: jnp.pad(y, ((0, 0), (0, missing), *((0, 0),) * (y.ndim - 2))) if missing else y  # noqa: E731
    x, since, batch = in_blocks(given.x), in_blocks(given.since), len(given.x)
    at = (lambda t: plan.steps - 1 - t) if plan.backward else lambda t: t
    in_time = pl.BlockSpec((None, plan.time, plan.group), lambda b, g, t: (b, at(t), g))
    of_row = lambda rows: pl.BlockSpec((None, rows, plan.group), lambda b, g, t: (b, 0, g))  # noqa: E731
    inputs = [
        (x, in_time),
        (given.weights, pl.BlockSpec((plan.width + 1, plan.group), lambda b, g, t: (0, g))),
        (since[:, None], pl.BlockSpec((None, 1, plan.time), lambda b, g, t: (b, 0, at(t)))),
        (jnp.pad(given.state.astype(wide), ((0, 0), (halo, 0), (0, 0))), of_row(SUBLANES)),
    ]
    outputs, carried = [(x.shape, x.dtype, in_time)], SUBLANES
    if plan.backward:
        before = lambda t: jnp.maximum(at(t) * (plan.time // SUBLANES) - 1, 0)  # noqa: E731
        beside = pl.BlockSpec((None, SUBLANES, plan.group), lambda b, g, t: (b, before(t), g))
        inputs += [(in_blocks(d_y), in_time), (x, beside)]
        sums, carried = (plan.width + 1) * SUBLANES, (plan.width - 1) * SUBLANES
        outputs += [((batch, rows, plan.channels), wide, of_row(rows)) for rows in (sums, SUBLANES)]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    return pl.pallas_call(
        functools.partial(_gradient if plan.backward else _forward, plan),
        grid=(batch, plan.channels // plan.group, plan.steps),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((plan.time, LANES), jnp.int32), pltpu.VMEM((carried, plan.group), wide)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=memory.VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=x.size * plan.width * (6 if plan.backward else 2),
            transcendentals=3 * x.size * plan.after.silu,
            bytes_accessed=sum(y.size * y.dtype.itemsize for y in [*(y for y, _ in inputs), *shapes]),
        ),
        name=f"short_convolution_{'gradient' if plan.backward else 'forward'}{'_heads' if plan.after.head else ''}",
        interpret=target.interpret,
    )(*(y for y, _ in inputs))


def _forward(plan: Plan, x, weights, since, state, y, marks, last) -> None:
    """``last``: the 8 inputs before the tokens at hand."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        last[...] = state[...]

    fill(marks, since)

    def tokens(at, _):
        heads = _Heads(plan)
        for lanes in _registers(plan):
            inputs = _Inputs(plan, x[at, lanes].astype(weights.dtype), last[:, lanes], marks[at])
            last[:, lanes] = inputs.own[-SUBLANES:]
            z = inputs.filtered(weights, lanes)
            for part in heads.after(_Part(lanes, z * _sigmoid(z) if plan.after.silu else z)):
                y[at, part.lanes] = (part.y if part.scale is None else part.y * part.scale).astype(y.dtype)

    _each(plan, tokens)


def _gradient(plan: Plan, x, weights, since, state, d_y, beside, d_x, sums, d_state, marks, after) -> None:
    """``after``: by lag, dz of the 8 tokens after those at hand, where it reaches them."""
    step, wide = pl.program_id(2), weights.dtype
    is_first = step == plan.steps - 1

    @pl.when(step == 0)
    def _():
        after[...] = jnp.zeros_like(after)
        sums[...] = jnp.zeros_like(sums)

    fill(marks, since)

    def tokens(at, first):
        heads, kept = _Heads(plan), {}
        for lanes in _registers(plan):
            outside = jnp.where(is_first, state[:, lanes], beside[:, lanes].astype(wide))
            # Two registers' rows, since those of bfloat16 have 16.
            inside = x[pl.ds(pl.multiple_of(jnp.maximum(first - 2 * SUBLANES, 0), SUBLANES), 2 * SUBLANES), lanes]
            before = jnp.where(first == 0, outside, inside.astype(wide)[SUBLANES:])
            inputs = _Inputs(plan, x[at, lanes].astype(wide), before, marks[at])
            z = inputs.filtered(weights, lanes)
            gate = _sigmoid(z) if plan.after.silu else 1
            kept[lanes.start] = inputs, z, gate
            for part in heads.after(_Part(lanes, z * gate, d_y[at, lanes].astype(wide))):
                inputs, z, gate = kept.pop(part.lanes.start)
                d = part.d if part.scale is None else part.scale * (part.d - part.y * part.along)
                d_z = d * (gate * (1 + z * (1 - gate))) if plan.after.silu else d
                d_x[at, part.lanes] = inputs.gradient(d_z, weights, sums, after, part.lanes).astype(d_x.dtype)

    _each(plan, tokens)

    @pl.when(is_first)
    def _():
        row, total = lax.broadcasted_iota(jnp.int32, d_state.shape, 0), jnp.zeros_like(d_state)
        for lag in range(1, plan.width):
            tap = plan.width - 1 - lag
            reached = pltpu.roll(after[_eight(lag - 1)], SUBLANES - lag, axis=0)
            reached = jnp.where(row >= SUBLANES - lag, reached, jnp.zeros_like(reached))
            sums[_eight(tap)] += reached * state[...]
            total = total + reached * weights[tap : tap + 1]
        d_state[...] = total


class _Inputs:
    """Some tokens of a register's channels ``[c, 128]``, and the 8 tokens before them."""

    def __init__(self, plan: Plan, own: jax.Array, before: jax.Array, marks: jax.Array):
        self.width, self.own = plan.width, own
        self._all, self._marks = jnp.concatenate([before, own]), marks[:, : own.shape[1]]

    def filtered(self, weights, lanes: slice) -> jax.Array:
        """z."""
        last = self.width - 1
        z = self.own * weights[last : last + 1, lanes] + weights[last + 1 : last + 2, lanes]
        for lag in range(1, self.width):
            earlier = self._reached(lag, pltpu.roll(self._all, lag, axis=0)[SUBLANES:])
            z = z + earlier * weights[last - lag : last - lag + 1, lanes]
        return z

    def gradient(self, d_z: jax.Array, weights, sums, after, lanes: slice) -> jax.Array:
        """dx. Those of the weights are added to ``sums``, over every eighth token each."""
        last = self.width - 1
        self._add(sums, last + 1, lanes, d_z)
        self._add(sums, last, lanes, d_z * self.own)
        d_x = d_z * weights[last : last + 1, lanes]
        for lag in range(1, self.width):
            d, tap, rows = self._reached(lag, d_z), last - lag, _eight(lag - 1)
            later = jnp.concatenate([d, after[rows, lanes]])
            later = pltpu.roll(later, later.shape[0] - lag, axis=0)[: d.shape[0]]
            after[rows, lanes] = d[:SUBLANES]
            self._add(sums, tap, lanes, later * self.own)
            d_x = d_x + later * weights[tap : tap + 1, lanes]
        return d_x

    def _reached(self, lag: int, x: jax.Array) -> jax.Array:
        """Zero where the token ``lag`` before belongs to another document."""
        return jnp.where(self._marks >= lag, x, jnp.zeros_like(x))

    def _add(self, sums, tap: int, lanes: slice, x: jax.Array) -> None:
        sums[_eight(tap), lanes] += jnp.sum(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)


class _Part(NamedTuple):
    """Of a register: y, its gradient ``d`` or, with unit length, u's; and then at each channel its head's
    1 / sqrt(|y|^2 + epsilon) and the product of y and d over this sum."""

    lanes: slice
    y: jax.Array
    d: jax.Array | None = None
    scale: Any = None
    along: Any = None


class _Heads:
    """Takes the registers of a block in order, and gives back those whose heads are complete, with what heads need."""

    def __init__(self, plan: Plan):
        self._head, self._epsilon = plan.after.head, plan.after.epsilon
        self._waiting: list[_Part] = []
        self._sums: dict[int, list[jax.Array]] = {}  # by head, so far
        self._found: dict[int, list[jax.Array]] = {}  # by head, ``scale`` and ``along``

    def after(self, part: _Part) -> Iterator[_Part]:
        if not self._head:
            yield part
            return
        self._waiting.append(part)
        of_channels = [part.y * part.y] + ([] if part.d is None else [part.y * part.d])
        for head, is_own in self._heads(part):
            sums = [jnp.sum(self._own(is_own, x), axis=1, keepdims=True) for x in of_channels]
            before = self._sums.get(head)
            self._sums[head] = sums if before is None else [x + y for x, y in zip(before, sums, strict=True)]
            if (head + 1) * self._head <= part.lanes.stop:
                square, *along = self._sums.pop(head)
                # As powers, which take fewer operations than ``rsqrt``.
                scale = jnp.exp2(-0.5 * jnp.log2(square + self._epsilon))
                self._found[head] = [scale, *[scale * scale * x for x in along]]
        while self._waiting and all(head in self._found for head, _ in self._heads(self._waiting[0])):
            part = self._waiting.pop(0)
            (first, _), *others = self._heads(part)
            found = self._found[first]
            for head, is_own in others:
                found = [jnp.where(is_own, new, x) for x, new in zip(found, self._found[head], strict=True)]
            yield _Part(part.lanes, part.y, part.d, *found)

    def _heads(self, part: _Part) -> Iterator[tuple[int, Any]]:
        """The heads in a register and, of each, which channels are its own; None for all."""
        lane = lax.broadcasted_iota(jnp.int32, part.y.shape, 1)
        for head in range(part.lanes.start // self._head, (part.lanes.stop - 1) // self._head + 1):
            first, end = (n * self._head - part.lanes.start for n in (head, head + 1))
            yield head, None if first <= 0 and end >= lane.shape[1] else (lane >= first) & (lane < end)

    def _own(self, is_own: Any, x: jax.Array) -> jax.Array:
        return x if is_own is None else jnp.where(is_own, x, jnp.zeros_like(x))


def _sigmoid(z: jax.Array) -> jax.Array:
    """As powers, which take fewer operations than a reciprocal and, unlike tanh, keep the digits of small results."""
    return jnp.exp2(-jnp.log2(1 + jnp.exp2(z * -_LOG2_E)))


def _registers(plan: Plan) -> list[slice]:
    return [slice(n, min(n + LANES, plan.group)) for n in range(0, plan.group, LANES)]


def _eight(n: int) -> slice:
    """The n-th eight rows."""
    return slice(n * SUBLANES, (n + 1) * SUBLANES)


def _each(plan: Plan, body: Callable[[Any, jax.Array], None]) -> None:
    """``body`` for so many tokens at a time: which of the block, and the first's number."""
    rows = blocks.TPU_ROWS
    count = plan.time // rows

    def step(i, carry):
        i = i.astype(jnp.int32)  # positions have 32 bits even under jax_enable_x64
        first = pl.multiple_of((count - 1 - i if plan.backward else i) * rows, rows)
        body(pl.ds(first, rows), first)
        return carry

    lax.fori_loop(0, count, step, jnp.int32(0))
