"""The RMSNorm with its gate for GPU, through Triton: a program goes through some tokens of one head, a few at a time.

The channels of a wide head are taken in pieces, so that few lanes are idle if their number is no power of two.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.gated_rms_norm import blocks
from jaxlinear.pallas.gated_rms_norm.kernel import Channels, Inputs, Norm, cost, inverse_and_along
from jaxlinear.pallas.parts.gpu_arithmetic import Arithmetic, arithmetic_of
from jaxlinear.pallas.parts.target import Target

_LOG2_E = math.log2(math.e)
_LANES = 32
_MOST_HEADS = 65_535  # programs along a grid's second axis


class Plan(NamedTuple):
    tokens: int  # B T
    norm: Norm
    skips: bool  # whether there is v
    lanes: int  # channels of a piece
    warps: int
    rows: int  # tokens at once
    time: int  # tokens of a program

    @property
    def pieces(self) -> int:
        """Of a head."""
        return pl.cdiv(self.norm.head, self.lanes)


def refusal(channels: int, head: int) -> str | None:
    """Why the kernel does not take so many channels, all and of a head, or None."""
    if head > blocks.GPU_HEAD:
        return f"the kernel takes heads of up to {blocks.GPU_HEAD} channels, not {head}"
    if channels > head * _MOST_HEADS:
        return f"the kernel takes up to {_MOST_HEADS} heads, not {channels // head}"
    return None


def forward(inputs: Inputs, norm: Norm, target: Target) -> jax.Array:
    """y, like x."""
    (y,) = _call(_forward, "forward", inputs, [], [inputs.x], norm, target)
    return y


def gradient(inputs: Inputs, d_y: jax.Array, norm: Norm, target: Target) -> Inputs:
    """From that of ``forward``'s output."""
    plan, wide = _plan(inputs, norm), inputs.weights
    sums = jax.ShapeDtypeStruct((pl.cdiv(plan.tokens, plan.time), *wide.shape), wide.dtype)
    outputs = [y for y in inputs[:-1] if y is not None]
    *found, d_weights = _call(_gradient, "gradient", inputs, [d_y], [*outputs, sums], norm, target)
    return Inputs(found[0], found[1], found[2] if plan.skips else None, jnp.sum(d_weights, axis=0))


def _plan(inputs: Inputs, norm: Norm) -> Plan:
    warps = pl.next_power_of_2(pl.cdiv(norm.head, _LANES * blocks.GPU_NUMBERS))
    lanes = max(_LANES, min(pl.next_power_of_2(norm.head), warps * _LANES * blocks.GPU_PIECE))
    rows = max(1, warps * _LANES * blocks.GPU_NUMBERS // pl.next_power_of_2(norm.head))
    rows = min(1 << (rows.bit_length() - 1), blocks.GPU_TIME)
    tokens = inputs.x.shape[0] * inputs.x.shape[1]
    return Plan(tokens, norm, inputs.skipped is not None, lanes, warps, rows, blocks.GPU_TIME)


def _call(kernel, kind: str, inputs: Inputs, more, outputs, norm: Norm, target: Target) -> list[jax.Array]:
    """``outputs``: what they are like."""
    plan, width = _plan(inputs, norm), inputs.x.shape[2]

    def flat(shape):
        return (plan.tokens, width) if shape == inputs.x.shape else shape

    given = [y if y is inputs.weights else y.reshape(flat(y.shape)) for y in (*inputs, *more) if y is not None]
    found = pl.pallas_call(
        functools.partial(kernel, plan, arithmetic_of(target)),
        grid=(pl.cdiv(plan.tokens, plan.time), width // norm.head),
        out_shape=[jax.ShapeDtypeStruct(flat(y.shape), y.dtype) for y in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=1),
        cost_estimate=pl.CostEstimate(**cost(inputs, kind == "gradient")),
        name=f"gated_rms_norm_{kind}",
        interpret=target.interpret,
    )(*given)
    return [y.reshape(like.shape) for y, like in zip(found, outputs, strict=True)]


def _forward(plan: Plan, arithmetic: Arithmetic, *arrays) -> None:
    *given, y = arrays
    tile = _Tile(plan, arithmetic, given)

    def block(i, carry):
        at = tile.at(i)
        pieces = [tile.channels(at, piece) for piece in range(plan.pieces)]
        inverse, _ = inverse_and_along(_total(piece.n * piece.n for piece in pieces), 0.0, plan.norm)
        for number, piece in enumerate(pieces):
            tile.store(y, at, number, piece.output(inverse, tile.w(number)))
        return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(plan.time // plan.rows), block, jnp.int32(0))


def _gradient(plan: Plan, arithmetic: Arithmetic, *arrays) -> None:
    count = 3 + plan.skips
    tile, d_y = _Tile(plan, arithmetic, arrays[:count]), arrays[count]
    *outputs, sums = arrays[count + 1 :]

    def block(i, totals):
        at = tile.at(i)
        pieces = [tile.channels(at, piece) for piece in range(plan.pieces)]
        d = [tile.load(d_y, at, piece) for piece in range(plan.pieces)]
        square = _total(piece.n * piece.n for piece in pieces)
        product = _total(
            piece.of_normed(d) * tile.w(number) * piece.n
            for number, (piece, d) in enumerate(zip(pieces, d, strict=True))
        )
        inverse, along = inverse_and_along(square, product, plan.norm)
        after = []
        for number, piece in enumerate(pieces):
            d_r, d_z, of_w = piece.gradients(d[number], inverse, along, tile.w(number))
            tile.store(outputs[0], at, number, d_r)
            tile.store(outputs[1], at, number, d_z)
            found = [of_w]
            if plan.skips:
                tile.store(outputs[2], at, number, d_r * tile.skip(number))
                found.append(d_r * tile.skipped(at, number))
            after.append([total + y for total, y in zip(totals[number], found, strict=True)])
        return after

    zero = jnp.zeros((plan.rows, plan.lanes), tile.wide)
    totals = [[zero] * (1 + plan.skips)] * plan.pieces
    totals = lax.fori_loop(jnp.int32(0), jnp.int32(plan.time // plan.rows), block, totals)
    for number, of_piece in enumerate(totals):
        for row, total in enumerate(of_piece):
            tile.put(sums, row, number, jnp.sum(total, axis=0))


def _total(pieces) -> jax.Array:
    """``[rows, 1]``."""
    return functools.reduce(jnp.add, (jnp.sum(piece, axis=1, keepdims=True) for piece in pieces))


class _Tile:
    """The tokens and the head of a program. Beyond both there are zeros, which are not written."""

    def __init__(self, plan: Plan, arithmetic: Arithmetic, arrays):
        self.plan, self._arithmetic = plan, arithmetic
        self._x, self._gate, *skipped, self._weights = arrays
        self._skipped, self.wide = (skipped[0] if skipped else None), self._weights.dtype
        self._part, self._head = pl.program_id(0), pl.program_id(1)
        self._w = [self._weight(0, piece) for piece in range(plan.pieces)]
        self._skip = [self._weight(1, piece) for piece in range(plan.pieces)] if plan.skips else []

    def w(self, piece: int) -> jax.Array:
        return self._w[piece][None]

    def skip(self, piece: int) -> jax.Array:
        return self._skip[piece][None]

    def at(self, i) -> tuple[Any, Any]:
        """The i-th rows, and which of them exist: None if all do."""
        first = self._part * self.plan.time + i * self.plan.rows
        rows = first + jnp.arange(self.plan.rows, dtype=jnp.int32)
        return pl.ds(first, self.plan.rows), rows < self.plan.tokens if self.plan.tokens % self.plan.time else None

    def channels(self, at, piece: int) -> Channels:
        r, z = self.load(self._x, at, piece), self.load(self._gate, at, piece)
        opened = self._arithmetic.reciprocal(1 + self._arithmetic.exp2(z * -_LOG2_E))
        if self.plan.skips:
            r = r + self.skip(piece) * self.skipped(at, piece)
        return Channels(r, z, opened, self.plan.norm)

    def skipped(self, at, piece: int) -> jax.Array:
        return self.load(self._skipped, at, piece)

    def load(self, ref, at, piece: int) -> jax.Array:
        mask = self._mask(at, piece)
        found = plgpu.load(ref.at[at[0], self._lanes(piece)], mask=mask, other=None if mask is None else 0)
        return found.astype(self.wide)

    def store(self, ref, at, piece: int, value: jax.Array) -> None:
        plgpu.store(ref.at[at[0], self._lanes(piece)], value.astype(ref.dtype), mask=self._mask(at, piece))

    def put(self, sums, row: int, piece: int, value: jax.Array) -> None:
        where = self._part, jnp.int32(row), self._lanes(piece)
        plgpu.store(sums.at[where], value.astype(sums.dtype), mask=self._inside(piece))

    def _weight(self, row: int, piece: int) -> jax.Array:
        mask = self._inside(piece)
        where = jnp.int32(row), self._lanes(piece)
        return plgpu.load(self._weights.at[where], mask=mask, other=None if mask is None else 0)

    def _lanes(self, piece: int):
        return pl.ds(self._head * self.plan.norm.head + piece * self.plan.lanes, self.plan.lanes)

    def _inside(self, piece: int) -> Any:
        """Which lanes are the head's; None if all are."""
        left = self.plan.norm.head - piece * self.plan.lanes
        return None if left >= self.plan.lanes else jnp.arange(self.plan.lanes, dtype=jnp.int32) < left

    def _mask(self, at, piece: int) -> Any:
        inside, exists = self._inside(piece), at[1]
        shape = self.plan.rows, self.plan.lanes
        if inside is None:
            return None if exists is None else jnp.broadcast_to(exists[:, None], shape)
        inside = jnp.broadcast_to(inside[None], shape)
        return inside if exists is None else inside & exists[:, None]
