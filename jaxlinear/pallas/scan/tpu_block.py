"""One block of the diagonal scan for TPU, with 8 time steps x 128 channels per register, as the arrays lie in memory.

Within a register three shift-and-multiply-add steps scan the 8 time steps (Hillis and Steele 1986), and the state before
them enters with one more multiply-add: little waits for the previous step, and the work of many registers overlaps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts import complex_parts as parts
from jaxlinear.pallas.parts.complex_parts import Parts
from jaxlinear.pallas.parts.lanes import LANES, SUBLANES, fill
from jaxlinear.pallas.scan.plan import Plan


class Shape(NamedTuple):
    length: int  # T
    time: int  # steps of a block
    width: int  # channels of a block
    rows: int  # steps of a group, which is processed in one iteration


class Block:
    """Reads and writes the refs of one block. A register column, 128 channels, is a tile."""

    def __init__(self, plan: Plan, shape: Shape, refs):
        remaining = iter(refs)

        def take(wanted: bool = True):
            return tuple(next(remaining) for _ in range(plan.parts)) if wanted else ()

        self.plan, self.shape = plan, shape
        self.a, self.x = take(), take()
        self.h, self.beside, self.before = take(plan.with_h), take(plan.with_h), take(plan.with_h)
        self.state = take()
        self.starts: Any = next(remaining) if plan.packed else None
        self.y = take(plan.emit)
        self.a_out = take(plan.with_h or not plan.emit)
        self.carry = take()  # the state between blocks and, at the end, the output
        self.resets: Any = next(remaining) if plan.packed else None  # the start marks, on all lanes

        step, steps = pl.program_id(2), pl.cdiv(shape.length, shape.time)
        left = shape.length - (steps - 1 - step if plan.reverse else step) * shape.time
        self.is_first, self.is_last = step == 0, step == steps - 1
        self.tail = shape.length % shape.rows  # steps of the sequence's last group, if it is incomplete
        whole = shape.time // shape.rows
        self.count = (
            whole if shape.length % shape.time == 0 else jnp.minimum(whole, lax.div(left, jnp.int32(shape.rows)))
        )
        self.wide = self.carry[0].dtype
        self.tiles = [slice(i, min(i + LANES, shape.width)) for i in range(0, shape.width, LANES)]

    def run(self) -> None:
        pl.when(self.is_first)(self._begin)
        if self.plan.packed:
            fill(self.resets, self.starts)
        if self.tail and self.plan.reverse:
            pl.when(self.is_first)(self._tail)
        body = (lambda i, c: self._group(self.count - 1 - i, c)) if self.plan.reverse else self._group
        self._store_carries(lax.fori_loop(0, self.count, body, self._load_carries()))
        if self.tail and not self.plan.reverse:
            pl.when(self.is_last)(self._tail)

    def _begin(self) -> None:
        for ref, state in zip(self.carry, self.state, strict=True):
            ref[...] = state[...]
        if not self.plan.emit:
            _fill(self.a_out, parts.one)
        elif self.plan.with_h and self.plan.constant:
            _fill(self.a_out, parts.zero)

    def _tail(self) -> None:
        self._store_carries(self._group(self.count, self._load_carries(), self.tail))

    def _load_carries(self) -> list[tuple[Parts, Parts]]:
        """By tiles: the state on all rows, and the product of all a, or the sums of the gradient of a constant a."""
        carries = []
        for tile in self.tiles:
            total: Parts = ()
            if not self.plan.emit:
                total = _on_all_rows(_columns(self.a_out, tile))
            elif self.plan.with_h and self.plan.constant:
                total = _columns(self.a_out, tile)
            carries.append((_on_all_rows(_columns(self.carry, tile)), total))
        return carries

    def _store_carries(self, carries) -> None:
        for tile, (state, total) in zip(self.tiles, carries, strict=True):
            for ref, value in zip(self.carry, state, strict=True):
                ref[:, tile] = value[:1]
            if total:
                for ref, value in zip(self.a_out, total, strict=True):
                    ref[:, tile] = value if self.plan.emit else value[:1]

    def _group(self, i, carries, valid: int | None = None):
        """The i-th group of the block, of which ``valid`` steps belong to the sequence, or all."""
        valid = self.shape.rows if valid is None else valid
        return [self._tile(i, tile, valid, *carry) for tile, carry in zip(self.tiles, carries, strict=True)]

    def _tile(self, i, tile: slice, valid: int, state: Parts, total: Parts) -> tuple[Parts, Parts]:
        plan, subs = self.plan, range(self.shape.rows // SUBLANES)
        row = lax.broadcasted_iota(jnp.int32, state[0].shape, 0)
        x_rows = self._load(self.x, i, tile)
        if plan.constant:
            a_rows = [_on_all_rows(_columns(self.a, tile, self.wide))] * len(subs)
        else:
            a_rows = self._load(self.a, i, tile)
        y_rows, d_a_rows = [parts.zero(x) for x in x_rows], [parts.zero(x) for x in x_rows]
        h_rows = self._h_before(i, tile, valid, row) if plan.with_h else []
        for j in reversed(subs) if plan.reverse else subs:
            begin = j * SUBLANES
            if begin >= valid:
                continue
            a, x = a_rows[j], x_rows[j]
            used = self._kept(i, begin, row)
            if used is not None:
                a = parts.where(used, a, parts.zero(a))
            if begin + SUBLANES > valid:
                inside = row < valid - begin
                a, x = parts.where(inside, a, parts.one(a)), parts.where(inside, x, parts.zero(x))
                used = inside if used is None else used & inside
            a_product, y = _scan(a, parts.times(a, x) if plan.lagged else x, row, plan.reverse)
            y = parts.plus(y, parts.times(a_product, state))
            if plan.lagged:
                g = parts.plus(x, _shift_in(y, state, row, plan.reverse))
            state = _on_all_rows(_last(y, plan.reverse))
            y_rows[j] = g if plan.lagged else y
            if plan.with_h:
                d_a = parts.times(g, h_rows[j])
                d_a_rows[j] = d_a if used is None else parts.where(used, d_a, parts.zero(d_a))
            elif not plan.emit:
                total = parts.times(total, _on_all_rows(_last(a_product, plan.reverse)))
        if plan.emit:
            self._store(self.y, i, tile, y_rows)
        if plan.with_h and plan.constant:
            for d_a in d_a_rows:
                total = parts.plus(total, d_a)
        elif plan.with_h:
            self._store(self.a_out, i, tile, d_a_rows)
        return state, total

    def _kept(self, i, begin: int, row: jax.Array) -> jax.Array | None:
        """Where the state before the step is kept, in a register of the i-th group; None for everywhere."""
        if self.resets is None:
            return None
        at = pl.multiple_of(i * self.shape.rows, self.shape.rows)
        return self.resets[pl.ds(at + begin, SUBLANES), : row.shape[1]] == 0

    def _h_before(self, i, tile: slice, valid: int, row: jax.Array) -> list[Parts]:
        """The h before each step of the i-th group in the direction of h, which is opposite to that of this scan."""
        towards_past, whole = self.plan.reverse, self.shape.time // self.shape.rows
        h = self._load(self.h, i, tile)
        before = _on_all_rows(_columns(self.before, tile))
        rows = tuple(y.astype(self.wide) for y in _columns(self.beside, tile))
        beside = _on_all_rows(tuple(y[-1:] if towards_past else y[:1] for y in rows))
        beside = parts.where(self.is_last, before, beside)
        if towards_past:
            edge = parts.where(i == 0, beside, self._load(self.h, jnp.maximum(i - 1, 0), tile)[-1])
            return [_shift_in(y, z, row, False) for y, z in zip(h, [edge, *h[:-1]], strict=True)]
        inner = self._load(self.h, jnp.minimum(i + 1, whole - 1), tile)[0]
        at_edge = i == self.count - 1
        edge = parts.where(at_edge & ~self.is_last if self.tail else at_edge, beside, inner)
        shifted = [_shift_in(y, z, row, True) for y, z in zip(h, [*h[1:], edge], strict=True)]
        if valid < self.shape.rows:  # the sequence ends here
            last, end = divmod(valid - 1, SUBLANES)
            shifted[last] = parts.where(row == end, before, shifted[last])
        return shifted

    def _load(self, refs, i, tile: slice) -> list[Parts]:
        """The i-th group, by registers."""
        at = pl.multiple_of(i * self.shape.rows, self.shape.rows)
        values = [ref[pl.ds(at, self.shape.rows), tile].astype(self.wide) for ref in refs]
        return [tuple(y[j : j + SUBLANES] for y in values) for j in range(0, self.shape.rows, SUBLANES)]

    def _store(self, refs, i, tile: slice, values: list[Parts]) -> None:
        at = pl.multiple_of(i * self.shape.rows, self.shape.rows)
        for ref, rows in zip(refs, zip(*values, strict=True), strict=True):
            ref[pl.ds(at, self.shape.rows), tile] = jnp.concatenate(rows, axis=0).astype(ref.dtype)


def _scan(a: Parts, x: Parts, row: jax.Array, reverse: bool) -> tuple[Parts, Parts]:
    """For 8 steps: the products of a up to each, and the states from a zero state before the first."""
    for by in (1, 2, 4):
        reached = row < SUBLANES - by if reverse else row >= by
        x = parts.plus(x, parts.times(a, parts.where(reached, _shift(x, by, reverse), parts.zero(x))))
        a = parts.times(a, parts.where(reached, _shift(a, by, reverse), parts.one(a)))
    return a, x


def _shift(x: Parts, by: int, reverse: bool) -> Parts:
    return tuple(pltpu.roll(y, SUBLANES - by if reverse else by, axis=0) for y in x)


def _shift_in(x: Parts, before: Parts, row: jax.Array, reverse: bool) -> Parts:
    """Each row's predecessor; the first row's is the last row of ``before``."""
    return _shift(parts.where(row == (0 if reverse else SUBLANES - 1), before, x), 1, reverse)


def _last(x: Parts, reverse: bool) -> Parts:
    return tuple(y[:1] if reverse else y[SUBLANES - 1 :] for y in x)


def _columns(refs, tile: slice, dtype=None) -> Parts:
    values = tuple(ref[:, tile] for ref in refs)
    return values if dtype is None else tuple(y.astype(dtype) for y in values)


def _on_all_rows(x: Parts) -> Parts:
    return tuple(jnp.broadcast_to(y, (SUBLANES, y.shape[1])) for y in x)


def _fill(refs, of) -> None:
    for ref, value in zip(refs, of(tuple(ref[...] for ref in refs)), strict=True):
        ref[...] = value
