"""The short convolution for GPU, through Triton: a program goes through some tokens, with a head's channels or others.

A lane has a few channels, of which it keeps the last inputs in registers: each is loaded once. A head's length is a sum
over the lanes. A program requests the next tokens before it works on those that have arrived. Backward it goes from the
last token to the first, beginning with those after its own that reach these.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts.gpu_arithmetic import Arithmetic, arithmetic_of
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.short_convolution import blocks
from jaxlinear.pallas.short_convolution.kernel import After, Inputs

_LOG2_E = math.log2(math.e)
_LARGEST_HEAD, _MOST_TAPS = 256, 9
_LANES = 32


class Plan(NamedTuple):
    length: int  # T
    channels: int  # D
    width: int  # taps
    after: After
    lanes: int  # channels that a program has room for
    warps: int
    time: int  # tokens of a program
    rows: int  # tokens that are processed at once

    @property
    def group(self) -> int:
        """Channels of a program."""
        return self.after.head or self.lanes

    @property
    def parts(self) -> int:
        """Of time."""
        return pl.cdiv(self.length, self.time)


def refusal(channels: int, width: int, head: int) -> str | None:
    """Why the kernel does not take so many channels, taps, or channels of a head, or None."""
    if not 2 <= width <= _MOST_TAPS:
        return f"the kernel takes 2 to {_MOST_TAPS} taps, not {width}"
    if head > _LARGEST_HEAD:
        return f"the kernel takes heads of up to {_LARGEST_HEAD} channels, not {head}"
    return None


def forward(inputs: Inputs, after: After, target: Target) -> jax.Array:
    """y or u, like x."""
    plan = _plan(inputs, after, backward=False)
    (y,) = _call(plan, _forward, "forward", inputs, [inputs.x], target)
    return y


def gradient(inputs: Inputs, d_y: jax.Array, after: After, target: Target) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of x, weights and state, from that of ``forward``'s output."""
    plan, weights = _plan(inputs, after, backward=True), inputs.weights
    of_weights = jax.ShapeDtypeStruct((len(d_y), plan.parts, *weights.shape), weights.dtype)
    outputs = [inputs.x, of_weights, inputs.state]
    d_x, d_weights, d_state = _call(plan, _gradient, "gradient", (*inputs, d_y), outputs, target)
    return d_x, jnp.sum(d_weights, axis=(0, 1)), d_state


def _plan(inputs: Inputs, after: After, *, backward: bool) -> Plan:
    _, length, channels = inputs.x.shape
    width = inputs.width
    least = pl.next_power_of_2(width - 1)  # what precedes a token is in its block or the one before
    lanes = max(_LANES, pl.next_power_of_2(after.head or min(channels, blocks.GPU_CHANNELS)))
    warps = pl.next_power_of_2(pl.cdiv(lanes * width, blocks.GPU_WEIGHTS))
    rows = max(blocks.GPU_ROWS[backward], least)
    return Plan(length, channels, width, after, lanes, warps, blocks.GPU_TIME, rows)


def _call(plan: Plan, kernel, kind: str, inputs, outputs, target: Target) -> list[jax.Array]:
    """``outputs``: what they are like."""
    x = inputs[0]
    shapes = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in outputs]
    return pl.pallas_call(
        functools.partial(kernel, plan, arithmetic_of(target)),
        grid=(pl.cdiv(plan.channels, plan.group), plan.parts, len(x)),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=x.size * plan.width * (6 if kind == "gradient" else 2),
            transcendentals=2 * x.size * plan.after.silu,
            bytes_accessed=sum(y.size * jnp.dtype(y.dtype).itemsize for y in [*inputs, *shapes]),
        ),
        name=f"short_convolution_{kind}{'_heads' if plan.after.head else ''}",
        interpret=target.interpret,
    )(*inputs)


def _forward(plan: Plan, arithmetic: Arithmetic, x, weights, since, state, y) -> None:
    tile = _Tile(plan, arithmetic, x, weights, since, state)

    def loads(first):
        return [(tile.load(x, first + j), tile.reached(first + j)) for j in range(plan.rows)]

    def block(i, carry):
        before, loaded = carry
        first = tile.first + i * plan.rows
        following = loads(jnp.minimum(first + plan.rows, tile.first + plan.time - plan.rows))
        for j, (own, reached) in enumerate(loaded):
            inputs = tile.inputs([own, *before], reached)
            result = tile.filtered(inputs)
            if plan.after.silu:
                result = result * tile.sigmoid(result)
            if plan.after.head:
                result = result * lax.rsqrt(jnp.sum(result * result) + plan.after.epsilon)
            tile.store(y, first + j, result)
            before = [own, *before[:-1]]
        return before, following

    before = [tile.input(tile.first - lag) for lag in range(1, plan.width)]
    _loop(plan, block, (before, loads(tile.first)))


def _gradient(plan: Plan, arithmetic: Arithmetic, x, weights, since, state, d_y, d_x, sums, d_state) -> None:
    tile, fma = _Tile(plan, arithmetic, x, weights, since, state), arithmetic.fma
    lags, end = plan.width - 1, tile.first + plan.time

    def loads(first):
        """For the tokens from ``first`` on, the inputs ``lags`` tokens before, and the gradients; and without heads how far
        they reach. With heads, ptxas would spill registers."""
        earlier = [tile.input(first - lags + j) for j in range(lags)]
        earlier += [tile.load(x, first + j) for j in range(plan.rows - lags)]
        reached = [] if plan.after.head else [tile.reached(first + j) for j in range(plan.rows)]
        return earlier, [tile.load(d_y, first + j) for j in range(plan.rows)], reached

    def of_sum(inputs, d):
        """The gradient of z."""
        d = d.astype(weights.dtype)
        if plan.after.is_linear:
            return d
        z = tile.filtered(inputs)
        gate = tile.sigmoid(z) if plan.after.silu else 1
        if plan.after.head:
            result = z * gate
            scale = lax.rsqrt(jnp.sum(result * result) + plan.after.epsilon)
            along = scale * scale * jnp.sum(result * d)
            d = scale * fma(-along, result, d)
        return d * fma(gate, z * (1 - gate), gate) if plan.after.silu else d

    def backwards(d_z, reached, of_earlier):
        """The gradient of the token's own input; and what is known so far of those before it."""
        known = enumerate([*of_earlier[1:], jnp.zeros_like(d_z)], 1)
        earlier = [jnp.where(reached >= lag, fma(d_z, tile.tap(lag), d), d) for lag, d in known]
        return fma(d_z, tile.tap(0), of_earlier[0]), earlier

    def block(i, carry):
        inputs_after, of_earlier, totals, (earlier, d, known) = carry
        first = end - (i + 1) * plan.rows
        following = loads(jnp.maximum(first - plan.rows, tile.first))
        in_order = earlier + inputs_after  # from lags before the first on
        for j in reversed(range(plan.rows)):
            reached = tile.reached(first + j) if plan.after.head else known[j]
            inputs = tile.inputs(in_order[j : j + plan.width][::-1], reached)
            d_z = of_sum(inputs, d[j])
            totals = [fma(d_z, y, total) for y, total in zip(inputs[::-1], totals, strict=False)] + [totals[-1] + d_z]
            own, of_earlier = backwards(d_z, reached, of_earlier)
            tile.store(d_x, first + j, own)
        return earlier[:lags], of_earlier, totals, following

    of_earlier = [jnp.zeros((plan.lanes,), weights.dtype)] * lags
    after = [tile.load(x, end + j, beyond=True) for j in range(-lags, lags)]
    for j in reversed(range(lags)):
        inputs = tile.inputs(after[j : j + plan.width][::-1], reached := tile.reached(end + j))
        _, of_earlier = backwards(of_sum(inputs, tile.load(d_y, end + j, beyond=True)), reached, of_earlier)
    totals = [jnp.zeros((plan.lanes,), weights.dtype)] * (plan.width + 1)
    carry = after[:lags], of_earlier, totals, loads(end - plan.rows)
    _, of_earlier, totals, _ = _loop(plan, block, carry)
    for row, total in enumerate(totals):
        tile.put(sums, (tile.batch, tile.part, row), total)
    for lag, total in enumerate(of_earlier, 1):
        tile.put(d_state, (tile.batch, lags - lag), total, when=tile.part == 0)


def _loop(plan: Plan, block, carry):
    return lax.fori_loop(jnp.int32(0), jnp.int32(plan.time // plan.rows), block, carry)


class _Tile:
    """The tokens and channels of a program, and its weights. Beyond T and D there are zeros, which are not written."""

    def __init__(self, plan: Plan, arithmetic: Arithmetic, x, weights, since, state):
        self.plan, self._arithmetic = plan, arithmetic
        self._x, self._since, self._state, self._wide = x, since, state, weights.dtype
        group, self.part, self.batch = (pl.program_id(n) for n in range(3))
        self.first = self.part * plan.time
        self._channels = pl.ds(group * plan.group, plan.lanes)
        lane = jnp.arange(plan.lanes, dtype=jnp.int32)
        self._is_own: Any = None if plan.group == plan.lanes else lane < plan.group
        if plan.channels % plan.group:
            inside = group * plan.group + lane < plan.channels
            self._is_own = inside if self._is_own is None else self._is_own & inside
        self._weights = [self._get(weights, (n,)).astype(self._wide) for n in range(plan.width + 1)]

    def tap(self, lag: int) -> jax.Array:
        return self._weights[self.plan.width - 1 - lag]

    def load(self, ref, t, *, beyond: bool = False) -> jax.Array:
        """Of a token, which may be ``beyond`` the program's own."""
        return self._get(ref, (self.batch, t), self._exists(t, beyond))

    def store(self, ref, t, value: jax.Array) -> None:
        self.put(ref, (self.batch, t), value, self._exists(t))

    def input(self, t) -> jax.Array:
        """x of a token that the program's own reach. Those before the first are the state's."""
        in_state = jnp.minimum(t, -1) + self.plan.width - 1
        of_state = self._get(self._state, (self.batch, in_state), t < 0)
        exists = self._exists(t)
        of_x = self._get(self._x, (self.batch, t), t >= 0 if exists is None else exists & (t >= 0))
        return jnp.where(t < 0, of_state, of_x)

    def reached(self, t) -> jax.Array:
        """How many of the tokens before this one belong to its document."""
        return plgpu.load(self._since.at[self.batch, jnp.minimum(t, self.plan.length - 1)])

    def inputs(self, inputs: list[jax.Array], reached: jax.Array) -> list[jax.Array]:
        """By lag, in the dtype to compute in, zero where they belong to another document."""
        own, *others = (x.astype(self._wide) for x in inputs)
        return [own, *(jnp.where(reached >= lag, x, jnp.zeros_like(x)) for lag, x in enumerate(others, 1))]

    def filtered(self, inputs: list[jax.Array]) -> jax.Array:
        """z."""
        z = self._weights[-1]
        for lag, x in enumerate(inputs):
            z = self._arithmetic.fma(x, self.tap(lag), z)
        return z

    def sigmoid(self, z: jax.Array) -> jax.Array:
        return 1 / (1 + self._arithmetic.exp2(z * -_LOG2_E))

    def put(self, ref, at: tuple, value: jax.Array, when=None) -> None:
        plgpu.store(ref.at[(*map(jnp.int32, at), self._channels)], value.astype(ref.dtype), mask=self._mask(when))

    def _get(self, ref, at: tuple, when=None) -> jax.Array:
        mask = self._mask(when)
        other = None if mask is None else 0
        return plgpu.load(ref.at[(*map(jnp.int32, at), self._channels)], mask=mask, other=other)

    def _exists(self, t, beyond: bool = False) -> Any:
        """None if it must."""
        return t < self.plan.length if beyond or self.plan.length % self.plan.time else None

    def _mask(self, when) -> Any:
        if when is None or self._is_own is None:
            return self._is_own if when is None else jnp.broadcast_to(when, (self.plan.lanes,))
        return self._is_own & when
