"""The share of channels and state numbers of one program of the selective scan for GPU: memory and arithmetic.

A program is a warp. Its lanes divide the channels 8 ways and the numbers of the state 4 ways. All values are
``[numbers of a lane, channels of a lane, 8, 4]``, some with axes of 1 instead. Triton gives the last axes to lanes and
keeps the first ones in registers, and a lane's channels are contiguous, so that one instruction loads or stores several: no
layout is converted, and nothing goes through shared memory.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts.gpu_arithmetic import Arithmetic
from jaxlinear.pallas.selective_scan.blocks import GPUBlock
from jaxlinear.pallas.selective_scan.plan import Plan

_LANES = 8, 4


class Shape(NamedTuple):
    """The sizes of the arrays, and how they are tiled."""

    length: int
    width: int
    states: int
    block: GPUBlock

    @property
    def channels(self) -> int:
        """Channels of a program."""
        return self.block.channels * _LANES[0]

    @property
    def numbers(self) -> int:
        """Numbers of a channel's state in a program."""
        return self.block.numbers * _LANES[1]

    @property
    def tiles(self) -> tuple[int, int]:
        """The number of tiles of the channels and of the numbers of the state."""
        return pl.cdiv(self.width, self.channels), pl.cdiv(self.states, self.numbers)


class Row(NamedTuple):
    """A token as it was loaded; () for what the pass does not take."""

    x: Any  # [1, channels of a lane, 8, 4]
    dt: Any
    d_y: Any
    B: Any  # [numbers of a lane, 1, 8, 4]
    C: Any
    starts: Any  # a scalar


class Tile:
    def __init__(self, plan: Plan, shape: Shape, arithmetic: Arithmetic, refs: dict[str, Any]):
        self.plan, self.shape, self.refs = plan, shape, refs
        self.fma, self.exp2 = arithmetic.fma, arithmetic.exp2
        self.wide = refs["state"].dtype
        self.row_of_batch, self.channel_tile, self.number_tile = (pl.program_id(axis) for axis in range(3))
        channels, numbers = shape.block.channels, shape.block.numbers
        self.channels = self.channel_tile * shape.channels + _places((1, channels, *_LANES), own=1, lane=2)
        self.numbers = self.number_tile * shape.numbers + _places((numbers, 1, *_LANES), own=0, lane=3)
        self.is_channel = self.channels < shape.width if shape.width % shape.channels else None
        self.is_number = self.numbers < shape.states if shape.states % shape.numbers else None

    # Memory

    def load(self, name: str, t):
        """Loads token t; zeros beyond the last."""
        places, mask = (self.numbers, self.is_number) if name in ("B", "C") else (self.channels, self.is_channel)
        return self._load(name, (self.row_of_batch, t, places), self._if_token(t, mask, places.shape))

    def row(self, t) -> Row:
        loaded = [self.load(name, t) if name in self.refs else () for name in Row._fields[:-1]]
        starts = self._load("starts", (self.row_of_batch, t), self._if_token(t, None, ())) if self.plan.packed else ()
        return Row._make([*loaded, starts])

    def rows(self, start) -> list[Row]:
        return [self.row(start + j) for j in range(self.shape.block.rows)]

    def widened(self, row: Row) -> Row:
        return Row._make([*(y if isinstance(y, tuple) else y.astype(self.wide) for y in row[:-1]), row.starts])

    def rates(self):
        return self._load("A", self._at_states(), self._is_state()) if self.plan.rates else None

    def states(self, name: str, *at):
        return self._load(name, (self.row_of_batch, *at, *self._at_states()), self._is_state())

    def store_states(self, name: str, value, *at, when: Any = None) -> None:
        mask = self._is_state()
        if when is not None:
            when = self._everywhere(when)
            mask = when if mask is None else mask & when
        plgpu.store(self.refs[name].at[(self.row_of_batch, *at, *self._at_states())], value, mask=mask)

    def store_channels(self, name: str, value, t) -> None:
        """Stores the sum over the program's numbers of the state."""
        at, shape = (self.row_of_batch, self.number_tile, t, self.channels), self.channels.shape
        value = jnp.broadcast_to(value, shape).astype(self.refs[name].dtype)
        plgpu.store(self.refs[name].at[at], value, mask=self._if_token(t, self.is_channel, shape))

    def store_numbers(self, name: str, value, t) -> None:
        """Stores the sum over the program's channels."""
        at, shape = (self.row_of_batch, self.channel_tile, t, self.numbers), self.numbers.shape
        mask = self._if_token(t, self.is_number, shape)
        plgpu.store(self.refs[name].at[at], jnp.broadcast_to(value, shape), mask=mask)

    def _load(self, name: str, at: tuple, mask: Any):
        ref = self.refs[name]
        return plgpu.load(ref.at[at], mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))

    def _if_token(self, t, mask: Any, shape: tuple[int, ...]):
        """The mask if t is a token, and all False beyond the last."""
        if self.shape.length % self.shape.block.rows == 0:
            return mask
        here = jnp.broadcast_to(t < self.shape.length, shape)
        return here if mask is None else mask & here

    def _at_states(self) -> tuple:
        return self._everywhere(self.numbers), self._everywhere(self.channels)

    def _is_state(self):
        masks = [self._everywhere(mask) for mask in (self.is_number, self.is_channel) if mask is not None]
        return functools.reduce(jnp.logical_and, masks) if masks else None

    def _everywhere(self, x):
        return jnp.broadcast_to(x, (self.shape.block.numbers, self.shape.block.channels, *_LANES))

    # Arithmetic

    def constant(self, y):
        return jnp.full((1, 1, 1, 1), y, self.wide)

    def unless_start(self, row: Row, y, otherwise):
        """y, or ``otherwise`` where the state is forgotten."""
        return jnp.where(row.starts == 0, y, otherwise) if self.plan.packed else y


def over_numbers(x):
    """The sum over the numbers of the state: ``[1, channels of a lane, 8, 1]``."""
    return jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=3, keepdims=True)


def over_channels(x):
    """The sum over the channels of a lane: ``[numbers of a lane, 1, 8, 4]``."""
    return jnp.sum(x, axis=1, keepdims=True)


def over_lanes(x):
    """The sum over the lanes of other channels: ``[numbers of a lane, 1, 1, 4]``."""
    return jnp.sum(x, axis=2, keepdims=True)


def _places(shape: tuple[int, ...], own: int, lane: int):
    """Positions within a tile, along two axes: those of a lane are contiguous."""
    return lax.broadcasted_iota(jnp.int32, shape, lane) * shape[own] + lax.broadcasted_iota(jnp.int32, shape, own)
