"""The RMSNorm with its gate for TPU: a program has some tokens of all heads, and takes a few of them, a register of
channels at a time: once for the sums over a head, and once more for the results."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.gated_rms_norm import blocks
from jaxlinear.pallas.gated_rms_norm.kernel import Channels, Inputs, Norm, cost, inverse_and_along
from jaxlinear.pallas.parts import memory
from jaxlinear.pallas.parts.lanes import LANES, SUBLANES
from jaxlinear.pallas.parts.target import Target

_LOG2_E = math.log2(math.e)


class Plan(NamedTuple):
    length: int  # T
    channels: int  # D
    norm: Norm
    skips: bool  # whether there is v
    time: int  # tokens of a block

    @property
    def steps(self) -> int:
        return pl.cdiv(self.length, self.time)


def refusal(channels: int, head: int) -> str | None:
    """Why the kernel does not take so many channels, all and of a head, or None."""
    if head % LANES:
        return f"the kernel takes heads of whole registers of {LANES} channels, not of {head}"
    if _time(channels) is None:
        return f"the kernel has no room in VMEM for {channels} channels"
    return None


def forward(inputs: Inputs, norm: Norm, target: Target) -> jax.Array:
    """y, like x."""
    (y,) = _call(_forward, "forward", inputs, [], norm, target)
    return y


def gradient(inputs: Inputs, d_y: jax.Array, norm: Norm, target: Target) -> Inputs:
    """From that of ``forward``'s output."""
    *found, sums = _call(_gradient, "gradient", inputs, [d_y], norm, target)
    d_weights = jnp.sum(sums.reshape(len(sums), -1, SUBLANES, sums.shape[2]), axis=(0, 2))
    return Inputs(found[0], found[1], found[2] if inputs.skipped is not None else None, d_weights)


def _time(channels: int) -> int | None:
    """Tokens of a block; None if VMEM has no room for any."""
    return next((time for time in blocks.TPU_TIME if time * channels <= blocks.TPU_NUMBERS), None)


def _call(kernel, kind: str, inputs: Inputs, more, norm: Norm, target: Target) -> list[jax.Array]:
    (batch, length, width), backward = inputs.x.shape, kind == "gradient"
    time = _time(width)
    assert time is not None
    plan = Plan(length, width, norm, inputs.skipped is not None, time)
    in_time = pl.BlockSpec((None, time, width), lambda b, t: (b, t, 0))
    of_weights = pl.BlockSpec(inputs.weights.shape, lambda b, t: (0, 0))
    given = [(y, of_weights if y is inputs.weights else in_time) for y in (*inputs, *more) if y is not None]
    outputs = [inputs.x, *[y for y in (inputs.gate, inputs.skipped) if backward and y is not None]]
    shapes = [(jax.ShapeDtypeStruct(y.shape, y.dtype), in_time) for y in outputs]
    if backward:
        rows = len(inputs.weights) * SUBLANES
        sums = jax.ShapeDtypeStruct((batch, rows, width), inputs.weights.dtype)
        shapes.append((sums, pl.BlockSpec((None, rows, width), lambda b, t: (b, 0, 0))))
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(batch, plan.steps),
        in_specs=[spec for _, spec in given],
        out_specs=[spec for _, spec in shapes],
        out_shape=[shape for shape, _ in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=memory.VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(**cost(inputs, backward)),
        name=f"gated_rms_norm_{kind}",
        interpret=target.interpret,
    )(*(y for y, _ in given))


def _forward(plan: Plan, *arrays) -> None:
    *given, y = arrays

    def head(tile: _Tile, registers: list[slice]) -> None:
        square = tile.zeros()
        for at in registers:
            square += _squared(tile.channels(at).n)
        inverse, _ = inverse_and_along(_total(square), 0.0, plan.norm)
        for at in registers:
            tile.store(y, at, tile.channels(at).output(inverse, tile.w(at)))

    _each(plan, given, head)


def _gradient(plan: Plan, *arrays) -> None:
    count = 3 + plan.skips
    given, d_y, outputs, sums = arrays[:count], arrays[count], arrays[count + 1 : -1], arrays[-1]

    @pl.when(pl.program_id(1) == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    def head(tile: _Tile, registers: list[slice]) -> None:
        square, product = tile.zeros(), tile.zeros()
        for at in registers:
            part = tile.channels(at)
            square += _squared(part.n)
            product += part.of_normed(tile.load(d_y, at)) * tile.w(at) * part.n
        inverse, along = inverse_and_along(_total(square), _total(product), plan.norm)
        for at in registers:
            d_r, d_z, of_w = tile.channels(at).gradients(tile.load(d_y, at), inverse, along, tile.w(at))
            tile.store(outputs[0], at, d_r)
            tile.store(outputs[1], at, d_z)
            tile.add(sums, 0, at, of_w)
            if plan.skips:
                tile.store(outputs[2], at, d_r * tile.skip(at))
                tile.add(sums, 1, at, d_r * tile.skipped(at))

    _each(plan, given, head)


def _squared(x: jax.Array) -> jax.Array:
    return x * x


def _total(x: jax.Array) -> jax.Array:
    """``[rows, 1]``."""
    return jnp.sum(x, axis=1, keepdims=True)


class _Tile:
    """The tokens that are processed at once."""

    def __init__(self, plan: Plan, arrays, first, left):
        """``left``: tokens of the row from the first one on."""
        self.plan, self._rows = plan, pl.ds(first, blocks.TPU_ROWS)
        self._x, self._gate, *skipped, self._weights = arrays
        self._skipped, self.wide = (skipped[0] if skipped else None), self._weights.dtype
        self._exists: Any = None  # which tokens do; None if all do
        if plan.length % plan.time:
            self._exists = lax.broadcasted_iota(jnp.int32, (blocks.TPU_ROWS, LANES), 0) < left

    def zeros(self) -> jax.Array:
        return jnp.zeros((blocks.TPU_ROWS, LANES), self.wide)

    def channels(self, at) -> Channels:
        z = self.load(self._gate, at)
        # As powers, which take fewer operations than a reciprocal.
        opened = jnp.exp2(-jnp.log2(1 + jnp.exp2(z * -_LOG2_E)))
        r = self.load(self._x, at)
        if self.plan.skips:
            r = r + self.skip(at) * self.skipped(at)
        return Channels(r, z, opened, self.plan.norm)

    def skipped(self, at) -> jax.Array:
        return self.load(self._skipped, at)

    def w(self, at) -> jax.Array:
        return self._weights[0:1, at]

    def skip(self, at) -> jax.Array:
        return self._weights[1:2, at]

    def load(self, ref, at) -> jax.Array:
        return ref[self._rows, at].astype(self.wide)

    def store(self, ref, at, value: jax.Array) -> None:
        ref[self._rows, at] = value.astype(ref.dtype)

    def add(self, sums, row: int, at, value: jax.Array) -> None:
        """To those over every eighth token."""
        if self._exists is not None:
            value = jnp.where(self._exists, value, jnp.zeros_like(value))
        sums[slice(row * SUBLANES, (row + 1) * SUBLANES), at] += jnp.sum(value.reshape(-1, SUBLANES, LANES), axis=0)


def _each(plan: Plan, arrays, body: Callable[[_Tile, list[slice]], None]) -> None:
    """``body`` for a few tokens at a time and each head: its registers' channels."""
    rows, left = blocks.TPU_ROWS, plan.length - pl.program_id(1) * plan.time
    registers = [slice(first, first + LANES) for first in range(0, plan.channels, LANES)]
    of_head = plan.norm.head // LANES

    def step(i, carry):
        i = i.astype(jnp.int32)  # positions have 32 bits even under jax_enable_x64
        tile = _Tile(plan, arrays, pl.multiple_of(i * rows, rows), left - i * rows)
        for first in range(0, len(registers), of_head):
            body(tile, registers[first : first + of_head])
        return carry

    lax.fori_loop(0, plan.time // rows, step, jnp.int32(0))
