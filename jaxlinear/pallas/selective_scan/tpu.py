"""The selective scan for TPU: blocks of time and, within them, of channels are streamed through VMEM, double buffered.

Channels are lanes, and the N numbers of a channel's state rows of registers. A token's value for each channel is read on
all rows; that for each number, a column of B or C, lies on all lanes in VMEM, put there by the first block of channels. The
states of all channels stay in VMEM from block to block.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.pallas.parts import memory
from jaxlinear.pallas.parts.channel_decays import to_base_2
from jaxlinear.pallas.parts.lanes import LANES, SUBLANES
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.selective_scan import blocks
from jaxlinear.pallas.selective_scan.plan import Arguments, Plan


class _Shape(NamedTuple):
    length: int  # T
    states: int  # N
    channels: int  # D
    time: int  # tokens of a block
    width: int  # channels of a block


def call(plan: Plan, arguments: Arguments, target: Target) -> list[jax.Array]:
    """The outputs of ``Plan``, in its order; ``before`` are the states before every 128 tokens."""
    (batch, length, channels), states = arguments.dt.shape, arguments.state.shape[1]
    shape = _shape(arguments)
    steps = pl.cdiv(shape.length, shape.time)
    arguments = _whole(arguments, steps * shape.time)
    specs = _specs(shape, (lambda t: steps - 1 - t) if plan.reverse else (lambda t: t))
    inputs, outputs = _inputs(arguments), _outputs(plan, arguments, steps * shape.time)
    scratch = _scratch(plan, shape, arguments.state.dtype)
    found = pl.pallas_call(
        functools.partial(_kernel, plan, shape, [name for name, *_ in inputs + outputs], list(scratch)),
        grid=(batch, steps, shape.channels // shape.width),
        in_specs=[specs[form] for _, form, _ in inputs],
        out_specs=[specs[form] for _, form, _ in outputs],
        out_shape=[y for *_, y in outputs],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=memory.VMEM_BYTES
        ),
        cost_estimate=plan.cost(arguments, [y for *_, y in outputs]),
        name=plan.name,
        interpret=target.interpret,
    )(*(y for *_, y in inputs))
    cut = {
        "in_time": lambda y: y[:, :length, :channels],
        "of_keys": lambda y: y[:, :states, :length].swapaxes(1, 2),
        "state": lambda y: y[:, :states, :channels],
        "rates_by_row": lambda y: jnp.sum(y[:, :states, :channels], axis=0),
        "before": lambda y: y,
    }
    return [cut[form](y) for (_, form, _), y in zip(outputs, found, strict=True)]


def _shape(arguments: Arguments) -> _Shape:
    """The shape in whole registers."""
    (_, length, channels), states = arguments.dt.shape, arguments.state.shape[1]
    sizes = (length, blocks.ROWS), (states, SUBLANES), (channels, LANES)
    length, states, channels = (n + -n % whole for n, whole in sizes)
    return _Shape(length, states, channels, *blocks.tpu(length, states, channels))


def _specs(shape: _Shape, at) -> dict[str, pl.BlockSpec]:
    """Block specs by form; ``at(t)`` is the block of time processed in grid step t."""
    time, states, width = shape.time, shape.states, shape.width
    state = pl.BlockSpec((None, states, shape.channels), lambda b, t, d: (b, 0, 0))
    return {
        "in_time": pl.BlockSpec((None, time, width), lambda b, t, d: (b, at(t), d)),
        "of_keys": pl.BlockSpec((None, states, time), lambda b, t, d: (b, 0, at(t))),
        "rates": pl.BlockSpec((states, shape.channels), lambda b, t, d: (0, 0)),
        "state": state,
        "rates_by_row": state,
        "before": pl.BlockSpec((None, time // LANES, states, width), lambda b, t, d: (b, at(t), 0, d)),
        "marks": pl.BlockSpec((None, 1, time), lambda b, t, d: (b, 0, at(t)), memory_space=pltpu.SMEM),
    }


def _whole(arguments: Arguments, time: int) -> Arguments:
    """The arguments padded to whole registers with zeros for numbers, channels and tokens, which change nothing. B and C
    are transposed, ``[B, N, T]``. The marks, read as scalars, are as many as the tokens of all blocks, ``time``."""

    def padded(y, *multiples):
        if y is None:
            return None
        lengths = [(0, -n % multiple) for n, multiple in zip(y.shape, multiples, strict=True)]
        return jnp.pad(y, lengths) if any(more for _, more in lengths) else y

    def turned(y):
        return None if y is None else padded(y.swapaxes(1, 2), 1, SUBLANES, LANES)

    return Arguments(
        x=padded(arguments.x, 1, blocks.ROWS, LANES),
        dt=padded(arguments.dt, 1, blocks.ROWS, LANES),
        A=padded(arguments.A, SUBLANES, LANES),
        B=turned(arguments.B),
        C=turned(arguments.C),
        state=padded(arguments.state, 1, SUBLANES, LANES),
        starts=None if arguments.starts is None else padded(arguments.starts.astype(jnp.int32), 1, time)[:, None],
        before=arguments.before,
        d_y=padded(arguments.d_y, 1, blocks.ROWS, LANES),
    )


_Array = tuple[str, str, Any]  # its name in ``_Block``, its form and what it is


def _inputs(arguments: Arguments) -> list[_Array]:
    rates = None if arguments.A is None else to_base_2(arguments.A)
    inputs = [
        ("x", "in_time", arguments.x),
        ("dt", "in_time", arguments.dt),
        ("d_y", "in_time", arguments.d_y),
        ("A", "rates", rates),
        ("B", "of_keys", arguments.B),
        ("C", "of_keys", arguments.C),
        ("state", "state", arguments.state),
        ("before", "before", arguments.before),
        ("starts", "marks", arguments.starts),
    ]
    return [array for array in inputs if array[2] is not None]


def _outputs(plan: Plan, arguments: Arguments, length: int) -> list[_Array]:
    (batch, states, width), wide = arguments.state.shape, arguments.state.dtype
    state = jax.ShapeDtypeStruct((batch, states, width), wide)
    final = ("final", "state", state)
    if plan.kind in ("summary", "state_gradient"):
        return [final]
    assert arguments.x is not None
    in_time = jax.ShapeDtypeStruct(arguments.x.shape, arguments.x.dtype)
    if plan.kind == "forward":
        before = jax.ShapeDtypeStruct((batch, length // LANES, states, width), wide)
        return [("y", "in_time", in_time), final, *([("before", "before", before)] if plan.keep else [])]
    of_keys = jax.ShapeDtypeStruct((batch, states, length), wide)
    return [
        ("d_x", "in_time", in_time),
        ("d_dt", "in_time", jax.ShapeDtypeStruct(arguments.dt.shape, arguments.dt.dtype)),
        ("d_B", "of_keys", of_keys),
        ("d_C", "of_keys", of_keys),
        final,
        *([("d_A", "rates_by_row", state)] if plan.rates else []),
    ]


def _scratch(plan: Plan, shape: _Shape, wide) -> dict[str, Any]:
    """All in the dtype to compute in: rows of 128 tokens, columns of a block of time, states of 128 tokens."""
    rows, columns = {
        "forward": (("dt", "u"), ("B", "C")),
        "summary": (("dt", "u"), ("B",)),
        "gradient": (("dt", "u", "d_y"), ("B", "C")),
        "state_gradient": (("dt", "d_y"), ("C",) if plan.rates else ("B", "C")),
    }[plan.kind]
    scratch = {f"{name}_rows": pltpu.VMEM((LANES, shape.width), wide) for name in rows}
    scratch |= {f"{name}_columns": pltpu.VMEM((shape.time * shape.states, LANES), wide) for name in columns}
    if plan.kind == "gradient":
        scratch["states"] = pltpu.VMEM(((LANES + 1) * shape.states, shape.width), wide)
    return scratch


def _kernel(plan: Plan, shape: _Shape, names: list[str], scratch: list[str], *refs) -> None:
    _Block(plan, shape, dict(zip([*names, *scratch], refs, strict=True))).run()


class _Block:
    """Reads and writes the refs of one block: 128 tokens at a time, in groups of ``rows``, and 128 channels at a time. The
    states between blocks are in ``final``, the output that they become at the end."""

    def __init__(self, plan: Plan, shape: _Shape, refs: dict[str, Any]):
        self.plan, self.shape, self.refs = plan, shape, refs
        self.rows = blocks.ROWS
        self.step, steps = pl.program_id(1), pl.cdiv(shape.length, shape.time)
        self.block = pl.program_id(2)  # of channels
        self.left = shape.length - (steps - 1 - self.step if plan.reverse else self.step) * shape.time
        self.tiles = range(0, shape.width, LANES)
        self.wide = refs["final"].dtype

    def run(self) -> None:
        first = self.block == 0
        pl.when(jnp.logical_and(first, self.step == 0))(self._begin)
        pieces: Any = self.shape.time // LANES
        if self.shape.length % self.shape.time:
            pieces = jnp.minimum(pieces, lax.div(self.left + (LANES - 1), jnp.int32(LANES)))
        pl.when(first)(lambda: _each(pieces, self._spread))
        piece = self._gradient if self.plan.kind == "gradient" else self._piece
        _each(pieces, (lambda i: piece(pieces - 1 - i)) if self.plan.reverse else piece)

    def _begin(self) -> None:
        self.refs["final"][...] = self.refs["state"][...]
        if "d_A" in self.refs:
            self.refs["d_A"][...] = jnp.zeros_like(self.refs["d_A"])

    def _spread(self, piece) -> None:
        """Puts the columns of 128 tokens on all lanes, and sets their gradients to zero."""
        at = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)

        def group(name, i):
            turned = self.refs[name][:, at].astype(self.wide)
            turned = pltpu.roll(turned, lax.rem(LANES - i * self.rows, jnp.int32(LANES)), axis=1)
            for j in range(self.rows):
                column = self._of_token(piece * LANES + i * self.rows, j)
                self.refs[f"{name}_columns"][column] = jnp.broadcast_to(turned[:, j : j + 1], turned.shape)

        for name in ("B", "C"):
            if f"{name}_columns" in self.refs:
                _each(LANES // self.rows, functools.partial(group, name))
            if f"d_{name}" in self.refs:
                self.refs[f"d_{name}"][:, at] = jnp.zeros((self.shape.states, LANES), self.wide)

    def _of_token(self, start, j: int):
        """The rows of the j-th token from ``start``, where each has N."""
        states = self.shape.states
        return pl.ds(pl.multiple_of(start * states, SUBLANES) + j * states, states)

    def _groups(self, piece):
        """The number of groups of the piece that belong to the sequence."""
        whole = LANES // self.rows
        if self.shape.length % LANES == 0:
            return whole
        return jnp.minimum(whole, lax.div(self.left - piece * LANES, jnp.int32(self.rows)))

    def _fill(self, piece) -> None:
        """The rows of the piece in the dtype to compute in, so that single ones can be read on all rows."""
        at = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
        rows = {name: self.refs[name][at].astype(self.wide) for name in ("x", "dt", "d_y") if name in self.refs}
        if "u_rows" in self.refs:
            self.refs["u_rows"][...] = rows["dt"] * rows["x"]
        for name in ("dt", "d_y"):
            if f"{name}_rows" in self.refs:
                self.refs[f"{name}_rows"][...] = rows[name]

    def _channels(self, tile: int | None = None):
        """The position among all channels of the block, or of one tile of it."""
        start = pl.multiple_of(self.block * self.shape.width, LANES)
        return pl.ds(start, self.shape.width) if tile is None else pl.ds(start + tile, LANES)

    def _column(self, name: str, piece, group, j: int) -> jax.Array:
        """B or C for the j-th token of a group: ``[N, 128]``, each number on all lanes."""
        return self.refs[f"{name}_columns"][self._of_token(piece * LANES + group * self.rows, j)]

    def _row(self, name: str, group, j: int, tile: int) -> jax.Array:
        """The row of the j-th token of the group, on all rows: ``[N, 128]``."""
        rows = self.refs[f"{name}_rows"].at[pl.ds(pl.multiple_of(group * self.rows, self.rows), self.rows)]
        return jnp.broadcast_to(rows[j : j + 1, tile : tile + LANES], (self.shape.states, LANES))

    def _kept(self, a: jax.Array, piece, group, j: int) -> jax.Array:
        """a, but 0 where a document begins."""
        if "starts" not in self.refs:
            return a
        return a * (1 - self.refs["starts"][0, piece * LANES + group * self.rows + j]).astype(a.dtype)

    def _transition(self, piece, group, j: int, tile: int, rates: jax.Array | None) -> jax.Array:
        dt = self._row("dt", group, j, tile)
        if rates is not None:
            return self._kept(jnp.exp2(dt * rates), piece, group, j)
        k = self._column("B", piece, group, j)
        return self._kept(1 - dt * (k * k), piece, group, j)

    def _rates(self, tile: int) -> jax.Array | None:
        return self.refs["A"][:, self._channels(tile)] if self.plan.rates else None

    def _piece(self, piece) -> None:
        """Processes 128 tokens: forward, its summary, or the gradient of the state."""
        self._fill(piece)
        if "before" in self.refs:
            self.refs["before"][piece] = self.refs["final"][:, self._channels()]
        groups = self._groups(piece)
        step = self._back if self.plan.reverse else self._on

        def group(i):
            i = groups - 1 - i if self.plan.reverse else i
            self._of_tiles(lambda tile, state: step(piece, i, tile, state))

        _each(groups, group)

    def _of_tiles(self, function) -> None:
        """Replaces each tile's state with ``function(tile, state)``. All are loaded before any is stored, so that the
        compiler, which does not know them to be disjoint, need not take one after another."""
        states = [self.refs["final"][:, self._channels(tile)] for tile in self.tiles]
        for tile, state in zip(self.tiles, map(function, self.tiles, states), strict=True):
            self.refs["final"][:, self._channels(tile)] = state

    def _on(self, piece, group, tile: int, state: jax.Array) -> jax.Array:
        """Processes a group of tokens for 128 channels."""
        rates, read = self._rates(tile), []
        for j in range(self.rows):
            state = self._next(piece, group, j, tile, rates, state)
            if "y" in self.refs:
                read.append(state * self._column("C", piece, group, j))
        if read:
            at = pl.ds(pl.multiple_of(piece * LANES + group * self.rows, self.rows), self.rows)
            self.refs["y"][at, tile : tile + LANES] = _sums(read).astype(self.refs["y"].dtype)
        return state

    def _next(self, piece, group, j: int, tile: int, rates: jax.Array | None, state: jax.Array) -> jax.Array:
        a = self._transition(piece, group, j, tile, rates)
        return a * state + self._row("u", group, j, tile) * self._column("B", piece, group, j)

    def _back(self, piece, group, tile: int, d_state: jax.Array) -> jax.Array:
        rates = self._rates(tile)
        for j in reversed(range(self.rows)):
            d_state = d_state + self._column("C", piece, group, j) * self._row("d_y", group, j, tile)
            d_state = d_state * self._transition(piece, group, j, tile, rates)
        return d_state

    def _gradient(self, piece) -> None:
        """For 128 tokens: recomputes their states, then goes backwards."""
        self._fill(piece)
        groups = self._groups(piece)
        self.refs["states"][: self.shape.states] = self.refs["before"][piece]

        def again(i):
            # Token by token: stores are not reordered, and each tile has to wait for its own last token.
            tiles = [(tile, slice(tile, tile + LANES), self._rates(tile)) for tile in self.tiles]
            found = [self.refs["states"][self._of_token(i * self.rows, 0), lanes] for _, lanes, _ in tiles]
            for j in range(self.rows):
                for n, (tile, lanes, rates) in enumerate(tiles):
                    found[n] = self._next(piece, i, j, tile, rates, found[n])
                    self.refs["states"][self._of_token(i * self.rows, j + 1), lanes] = found[n]

        _each(groups, again)
        _each(groups, lambda i: self._group_gradient(piece, groups - 1 - i))

    def _group_gradient(self, piece, group) -> None:
        """The gradients of a group of tokens."""
        at = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
        of_keys = {name: [jnp.zeros((self.shape.states, LANES), self.wide)] * self.rows for name in ("d_B", "d_C")}
        self._of_tiles(lambda tile, d_state: self._tile_gradient(piece, group, tile, d_state, *of_keys.values()))
        lane = lax.broadcasted_iota(jnp.int32, (self.shape.states, LANES), 1)
        for name, tokens in of_keys.items():
            sums = self.refs[name][:, at]
            for j, numbers in enumerate(tokens):
                more = sums + jnp.sum(numbers, axis=1, keepdims=True)
                sums = jnp.where(lane == group * self.rows + j, more, sums)
            self.refs[name][:, at] = sums

    def _tile_gradient(
        self, piece, group, tile: int, d_state: jax.Array, of_k: list[jax.Array], of_q: list[jax.Array]
    ) -> jax.Array:
        """Adds to ``of_k`` and ``of_q`` what 128 channels contribute to B's and C's gradients, before these are summed."""
        refs, lanes, rates = self.refs, slice(tile, tile + LANES), self._rates(tile)
        d_A = jnp.zeros_like(d_state)
        of_u, of_dt = [], []
        for j in reversed(range(self.rows)):
            before, after = (refs["states"][self._of_token(group * self.rows, i), lanes] for i in (j, j + 1))
            k, q = (self._column(name, piece, group, j) for name in ("B", "C"))
            dt, u, d_y = (self._row(name, group, j, tile) for name in ("dt", "u", "d_y"))
            d_state = d_state + q * d_y
            of_q[j] = of_q[j] + after * d_y
            of_u.append(d_state * k)
            of_k[j] = of_k[j] + d_state * u
            a = self._transition(piece, group, j, tile, rates)
            if rates is not None:
                d_log = d_state * a * before
                of_dt.append(d_log * rates)
                d_A = d_A + d_log * dt
            else:
                d_a = self._kept(d_state * before, piece, group, j)
                of_dt.append(d_a * (k * k))
                of_k[j] = of_k[j] - 2 * k * (d_a * dt)
            d_state = a * d_state
        if rates is not None:
            refs["d_A"][:, self._channels(tile)] += d_A
        self._of_rows(piece, group, lanes, _sums(of_u[::-1]), _sums(of_dt[::-1]))
        return d_state

    def _of_rows(self, piece, group, lanes: slice, d_u: jax.Array, of_dt: jax.Array) -> None:
        """The gradients of x and dt ``[rows, 128]``."""
        at = pl.ds(pl.multiple_of(piece * LANES + group * self.rows, self.rows), self.rows)
        x, dt = (self.refs[name][at, lanes].astype(self.wide) for name in ("x", "dt"))
        d_dt = d_u * x + (math.log(2) * of_dt if self.plan.rates else -of_dt)
        self.refs["d_x"][at, lanes] = (d_u * dt).astype(self.refs["d_x"].dtype)
        self.refs["d_dt"][at, lanes] = d_dt.astype(self.refs["d_dt"].dtype)


def _each(count, body) -> None:
    """``body(i)`` for each of ``count``; i has 32 bits even under jax_enable_x64."""
    lax.fori_loop(0, count, lambda i, carry: body(i.astype(jnp.int32)) or carry, jnp.int32(0))


def _sums(tokens: list[jax.Array]) -> jax.Array:
    """For each of some tokens ``[N, 128]`` the sum over N, as a row: ``[tokens, 128]``, a multiple of 8 tokens."""
    eights = [_eight_sums(tokens[i : i + SUBLANES]) for i in range(0, len(tokens), SUBLANES)]
    return jnp.concatenate(eights, axis=0) if len(eights) > 1 else eights[0]


def _eight_sums(tokens: list[jax.Array]) -> jax.Array:
    """First adds up registers; then adds the rows of two tokens in one register, of four, and of eight: each addition
    halves the rows that a token has, and none is wasted."""
    rows = [sum(y[i : i + SUBLANES] for i in range(SUBLANES, len(y), SUBLANES)) + y[:SUBLANES] for y in tokens]
    row = lax.broadcasted_iota(jnp.int32, rows[0].shape, 0)
    rows = [rows[i] for i in (0, 4, 2, 6, 1, 5, 3, 7)]  # so that the sum of token i ends up in row i
    for half in (4, 2, 1):
        first = lax.rem(row, jnp.int32(2 * half)) < half
        rows = [_added(rows[i], rows[i + 1], first, half) for i in range(0, len(rows), 2)]
    return rows[0]


def _added(x: jax.Array, y: jax.Array, first: jax.Array, half: int) -> jax.Array:
    """In the first ``half`` rows of each ``2 half``, the sums of two rows of x; in the others, those of y."""
    own, other = jnp.where(first, x, y), jnp.where(first, y, x)
    if half == SUBLANES // 2:
        return own + pltpu.roll(other, half, axis=0)
    return own + jnp.where(first, pltpu.roll(x, SUBLANES - half, axis=0), pltpu.roll(y, half, axis=0))
