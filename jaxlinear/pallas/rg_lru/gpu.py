"""The RG-LRU for GPU, through Triton: its gates and its recurrence in one kernel each way, given the products with W.

A thread has a channel, with its h in a register, and goes through the tokens; it requests the next ones before it works on
those that have arrived. Where rows and channels are too few to occupy a GPU, programs divide time as well: a kernel finds
what each part of time does to the state, and a scan over the parts gives the states between them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts.gpu_arithmetic import Arithmetic, arithmetic_of
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import blocks
from jaxlinear.pallas.rg_lru.equations import LOG2_E, Gates, one_minus_square
from jaxlinear.pallas.scan import kernel as scan

_FIRST, _START = 1, 2  # bits of a token's mark


class Inputs(NamedTuple):
    """``z`` ``[B, T, N, 2 K]``: the products of x ``[B, T, R]``, R = N K, with the blocks of W_a and, beside them, of W_x.
    ``vectors`` ``[3, R]``: b_a, b_x and the rate, in the dtype to compute in. ``first`` ``[B, T]`` bool: the first tokens
    of documents. ``starts`` ``[B, T]`` bool: where the state before the token is forgotten; or None."""

    z: jax.Array
    x: jax.Array
    vectors: jax.Array
    first: jax.Array
    starts: jax.Array | None


class Plan(NamedTuple):
    length: int  # T
    width: int  # R
    block: int  # K
    time: int  # tokens of a program
    rows: int  # tokens that are requested at once
    packed: bool

    @property
    def parts(self) -> int:
        """Of time."""
        return pl.cdiv(self.length, self.time)


def forward(inputs: Inputs, state: jax.Array, *, target: Target) -> tuple[jax.Array, jax.Array]:
    """h ``[B, T, R]`` and the last state ``[B, R]``, in the dtype of the vectors. ``state``: before the first token."""
    plan, before = _plan(inputs, backward=False), state[:, None]
    tokens = _flat(inputs.z), inputs.x, _marks(inputs), inputs.vectors
    if plan.parts > 1:
        products, finals = _call(plan, _summary, "summary", tokens, _of_parts(plan, state), target)
        after = _between(plan, products, finals, state, inputs.starts, target)
        before = jnp.concatenate([before, after], axis=1)
    outputs = [jax.ShapeDtypeStruct(inputs.x.shape, state.dtype), state]
    h, final = _call(plan, _forward, "forward", (*tokens, before), outputs, target)
    return h, final


def gradient(
    inputs: Inputs, state: jax.Array, h: jax.Array, d_h: jax.Array, d_final: jax.Array, *, target: Target
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of z, x, of which this is not the products' part, the vectors and the state, from those of
    ``forward``'s outputs; it gave h."""
    plan, after = _plan(inputs, backward=True), d_final[:, None]
    z, marks = _flat(inputs.z), _marks(inputs)
    if plan.parts > 1:
        given = z, d_h, marks, inputs.vectors
        products, finals = _call(plan, _state_gradient, "state_gradient", given, _of_parts(plan, state), target)
        before = _between(plan, products, finals, d_final, inputs.starts, target, backwards=True)
        after = jnp.concatenate([before, after], axis=1)
    sums = jax.ShapeDtypeStruct((len(state), plan.parts, *inputs.vectors.shape), inputs.vectors.dtype)
    tokens = z, inputs.x, h, d_h, marks, inputs.vectors, state, after
    outputs = [z, inputs.x, sums, state]
    d_z, d_x, d_vectors, d_state = _call(plan, _gradient, "gradient", tokens, outputs, target)
    return d_z.reshape(inputs.z.shape), d_x, jnp.sum(d_vectors, axis=(0, 1)), d_state


def _plan(inputs: Inputs, *, backward: bool) -> Plan:
    batch, length, width = inputs.x.shape
    rows = blocks.GPU_ROWS[backward]
    occupied = batch * pl.cdiv(width, blocks.GPU_CHANNELS) >= blocks.GPU_PROGRAMS
    time = pl.cdiv(length, rows) * rows
    time = time if occupied else min(time, blocks.GPU_TIME)
    return Plan(length, width, inputs.z.shape[3] // 2, time, rows, inputs.starts is not None)


def _flat(z: jax.Array) -> jax.Array:
    return z.reshape(*z.shape[:2], -1)


def _marks(inputs: Inputs) -> jax.Array:
    first = inputs.first.astype(jnp.int8) * _FIRST
    return first if inputs.starts is None else first + inputs.starts.astype(jnp.int8) * _START


def _of_parts(plan: Plan, state: jax.Array) -> list[jax.ShapeDtypeStruct]:
    """The product of a, and the state after tokens that begin with zero, of each part but the one that comes last."""
    shape = len(state), plan.parts - 1, plan.width
    return [jax.ShapeDtypeStruct(shape, state.dtype)] * 2


def _between(
    plan: Plan, products, finals, state: jax.Array, starts: jax.Array | None, target: Target, *, backwards: bool = False
) -> jax.Array:
    """The states between the parts ``[B, parts - 1, R]``."""
    if starts is not None:
        more = plan.parts * plan.time - plan.length
        starts = jnp.any(jnp.pad(starts, ((0, 0), (0, more))).reshape(len(state), plan.parts, plan.time), axis=2)
        starts = starts[:, 1:] if backwards else starts[:, :-1]
    return scan.forward(products, finals, state, starts, reverse=backwards, target=target)[0]


def _call(plan: Plan, kernel, kind: str, inputs, outputs, target: Target) -> list[jax.Array]:
    """``outputs``: what they are like. Those of a summary have as many parts as it has programs in time."""
    batch = len(inputs[0])
    numbers = batch * plan.length * plan.width
    shapes = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in outputs]
    parts = plan.parts - (kernel in (_summary, _state_gradient))
    return pl.pallas_call(
        functools.partial(kernel, plan, arithmetic_of(target)),
        grid=(pl.cdiv(plan.width, blocks.GPU_CHANNELS), parts, batch),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=20 * numbers,
            transcendentals=6 * numbers,
            bytes_accessed=sum(y.size * jnp.dtype(y.dtype).itemsize for y in [*inputs, *shapes]),
        ),
        name=f"rg_lru_{kind}{'_packed' if plan.packed else ''}",
        interpret=target.interpret,
    )(*inputs)


def _forward(plan: Plan, arithmetic: Arithmetic, z, x, marks, vectors, before, h, final) -> None:
    tile = _Tile(plan, arithmetic, marks, vectors)

    def step(t, loaded, state):
        *gates, mark = loaded
        gates = tile.gates(*gates)
        after = tile.fma(gates.a, tile.kept(state, mark), gates.input(tile.is_first(mark)))
        state = tile.if_exists(t, after, state)
        tile.store(tile.of(h), t, state)
        return state

    state = tile.over_time([tile.of_r(z), tile.of_i(z), tile.of(x)], step, tile.get(before, tile.part))
    tile.put(final, state, when=tile.part == plan.parts - 1)


def _summary(plan: Plan, arithmetic: Arithmetic, z, x, marks, vectors, products, finals) -> None:
    tile = _Tile(plan, arithmetic, marks, vectors)

    def step(t, loaded, carry):  # whose token exists: the last part has no summary
        *gates, mark = loaded
        product, state = (tile.kept(y, mark) for y in carry)
        gates = tile.gates(*gates)
        return gates.a * product, tile.fma(gates.a, state, gates.input(tile.is_first(mark)))

    product, state = tile.over_time([tile.of_r(z), tile.of_i(z), tile.of(x)], step, (tile.full(1), tile.full(0)))
    tile.put(products, product, tile.part)
    tile.put(finals, state, tile.part)


def _state_gradient(plan: Plan, arithmetic: Arithmetic, z, d_h, marks, vectors, products, finals) -> None:
    tile = _Tile(plan, arithmetic, marks, vectors, skipped=1)

    def step(t, loaded, carry):
        z, d_y, mark = loaded
        *_, a = tile.transition(z)
        product, d = carry
        after = tile.kept(a * product, mark), tile.kept(a * (d_y + d), mark)
        return tuple(tile.if_exists(t, new, old) for new, old in zip(after, carry, strict=True))

    product, d = tile.over_time([tile.of_r(z), tile.of(d_h)], step, (tile.full(1), tile.full(0)), backwards=True)
    tile.put(products, product, tile.part - 1)
    tile.put(finals, d, tile.part - 1)


def _gradient(
    plan: Plan, arithmetic: Arithmetic, z, x, h, d_h, marks, vectors, state, after, d_z, d_x, sums, d_state
) -> None:
    tile = _Tile(plan, arithmetic, marks, vectors)
    initial = tile.get(state)

    def step(t, loaded, carry):
        *gates, h_before, d_y, mark = loaded
        d, *totals = carry
        gates = tile.gates(*gates)
        d_u = tile.if_exists(t, d_y + d, tile.full(0))
        d_a = tile.kept(d_u * jnp.where(t == 0, initial, h_before), mark)
        d = tile.if_exists(t, tile.kept(gates.a * d_u, mark), d)
        of_r, of_i, of_rate, of_x = gates.gradients(tile.rate, d_a, d_u, tile.is_first(mark))
        for array, y in ((tile.of_r(d_z), of_r), (tile.of_i(d_z), of_i), (tile.of(d_x), of_x)):
            tile.store(array, t, y)
        return d, *(total + y for total, y in zip(totals, (of_r, of_i, of_rate), strict=True))

    carry = tile.get(after, tile.part), *[tile.full(0)] * 3
    arrays = [tile.of_r(z), tile.of_i(z), tile.of(x), tile.of(h, lag=1), tile.of(d_h)]
    d, *totals = tile.over_time(arrays, step, carry, backwards=True)
    for n, total in enumerate(totals):
        tile.put(sums, total, tile.part, n)
    tile.put(d_state, d, when=tile.part == 0)


class _Array(NamedTuple):
    """``[B, T, channels]``, of which a program has some ``channels``; ``lag``: those of so many tokens before."""

    ref: Any
    channels: Any
    lag: int = 0


class _Tile:
    """The tokens and channels of a program. Beyond T and R there are zeros, which are not written."""

    def __init__(self, plan: Plan, arithmetic: Arithmetic, marks, vectors, skipped: int = 0):
        """``skipped``: parts of time before the first program's."""
        self.plan, self._arithmetic, self._all_marks, self._wide = plan, arithmetic, marks, vectors.dtype
        group, part, self.batch = (pl.program_id(n) for n in range(3))
        self.part = part + skipped
        self.first = self.part * plan.time
        lanes = blocks.GPU_CHANNELS
        self._channels = pl.ds(group * lanes, lanes)
        channel = group * lanes + jnp.arange(lanes, dtype=jnp.int32)
        self._of_r = channel + lax.div(channel, jnp.int32(plan.block)) * plan.block
        self._inside: Any = channel < plan.width if plan.width % lanes else None
        self._bias_r, self._bias_i, self.rate = (self._read(self._place(vectors, n)) for n in range(3))

    def fma(self, x, y, z):
        return self._arithmetic.fma(x, y, z)

    def full(self, value: float) -> jax.Array:
        return jnp.full((blocks.GPU_CHANNELS,), value, self._wide)

    def transition(self, z) -> tuple[jax.Array, jax.Array, jax.Array]:
        """r, log2 a and a."""
        r = self._sigmoid(z, self._bias_r)
        log2_a = r * (self.rate * LOG2_E)
        return r, log2_a, self._arithmetic.exp2(log2_a)

    def gates(self, z_r, z_i, x) -> Gates:
        r, log2_a, a = self.transition(z_r)
        return Gates(r, self._sigmoid(z_i, self._bias_i), a, one_minus_square(log2_a, a), x)

    def _sigmoid(self, z, bias):
        exponent = self.fma(z, jnp.full_like(z, -LOG2_E), bias * -LOG2_E)
        return self._arithmetic.reciprocal(1 + self._arithmetic.exp2(exponent))

    def is_first(self, mark) -> jax.Array:
        return mark & _FIRST != 0

    def kept(self, y: jax.Array, mark) -> jax.Array:
        """y unless the token forgets the state before it."""
        return jnp.where(mark & _START == 0, y, jnp.zeros_like(y)) if self.plan.packed else y

    def if_exists(self, t, y: jax.Array, otherwise: jax.Array) -> jax.Array:
        return jnp.where(t < self.plan.length, y, otherwise) if self._may_end else y

    @property
    def _may_end(self) -> bool:
        """Whether programs go beyond the last token."""
        return self.plan.length % self.plan.time != 0

    def of(self, ref, lag: int = 0) -> _Array:
        return _Array(ref, self._channels, lag)

    def of_r(self, z) -> _Array:
        return _Array(z, self._of_r)

    def of_i(self, z) -> _Array:
        return _Array(z, self._of_r + self.plan.block)

    def over_time(self, arrays: list[_Array], step, carry, *, backwards: bool = False):
        """``carry = step(t, loaded, carry)`` for all tokens; ``loaded``: a token's numbers in each of the arrays, in the
        dtype to compute in, and its mark."""
        rows, count = self.plan.rows, self.plan.time // self.plan.rows

        def loads(start):
            tokens = [start + j for j in range(rows)]
            return [([self._load(array, t) for array in arrays], self._mark(t)) for t in tokens]

        def start_of(i):
            """Of the i-th block processed; beyond the last, of the last again."""
            i = jnp.minimum(i, count - 1)
            return self.first + (count - 1 - i if backwards else i) * rows

        def block(i, both):
            carry, loaded = both
            following = loads(start_of(i + 1))
            for j in reversed(range(rows)) if backwards else range(rows):
                numbers, mark = loaded[j]
                carry = step(start_of(i) + j, (*(y.astype(self._wide) for y in numbers), mark), carry)
            return carry, following

        carry, _ = lax.fori_loop(jnp.int32(0), jnp.int32(count), block, (carry, loads(start_of(jnp.int32(0)))))
        return carry

    def store(self, array: _Array, t, value: jax.Array) -> None:
        place = array.ref.at[self.batch, t, array.channels]
        self._write(place, value, t < self.plan.length if self._may_end else None)

    def get(self, ref, *at) -> jax.Array:
        """A number per channel."""
        return self._read(self._place(ref, self.batch, *at))

    def put(self, ref, value: jax.Array, *at, when=None) -> None:
        self._write(self._place(ref, self.batch, *at), value, when)

    def _mark(self, t):
        t = jnp.minimum(t, self.plan.length - 1) if self._may_end else t
        return self._all_marks[self.batch, t].astype(jnp.int32)

    def _load(self, array: _Array, t) -> jax.Array:
        exists = t < self.plan.length if self._may_end else None
        if array.lag:
            t = t - array.lag
            exists = t >= 0 if exists is None else exists & (t >= 0)
        return self._read(array.ref.at[self.batch, t, array.channels], exists)

    def _place(self, ref, *at):
        return ref.at[(*map(jnp.int32, at), self._channels)]

    def _read(self, place, when=None) -> jax.Array:
        mask = self._mask(when)
        return plgpu.load(place, mask=mask, other=None if mask is None else 0)

    def _write(self, place, value: jax.Array, when) -> None:
        plgpu.store(place, value.astype(place.dtype), mask=self._mask(when))

    def _mask(self, when) -> Any:
        if when is None:
            return self._inside
        when = jnp.broadcast_to(when, (blocks.GPU_CHANNELS,))
        return when if self._inside is None else self._inside & when
