"""The selective scan for GPU, through Triton: a warp goes through time with the states of a tile of channels in registers.

A lane has a few numbers of the state for a few channels. If a lane had all numbers of one channel, outputs would be sums
within it; but the gradients of B and C, which are sums over channels, would take ten exchanges between lanes for each
number of the state, whereas now all together take two and a half. A warp has up to 16 numbers of a channel's state. If
there are more, and over the tiles of channels, XLA adds up the sums of the programs.

Backward, a warp recomputes the states of a few tokens from those before blocks of time, which the forward pass kept.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts.channel_decays import to_base_2
from jaxlinear.pallas.parts.gpu_arithmetic import Arithmetic, arithmetic_of
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.selective_scan import blocks
from jaxlinear.pallas.selective_scan.gpu_tile import Row, Shape, Tile, over_channels, over_lanes, over_numbers
from jaxlinear.pallas.selective_scan.plan import Arguments, Plan


def call(plan: Plan, arguments: Arguments, target: Target) -> list[jax.Array]:
    """The outputs, in the order of ``_outputs``."""
    batch, length, width = arguments.dt.shape
    states = arguments.state.shape[1]
    shape = Shape(length, width, states, blocks.gpu(states))
    inputs = {name: x for name, x in arguments._asdict().items() if x is not None}
    if plan.rates:
        inputs["A"] = to_base_2(inputs["A"])
    if plan.packed:
        inputs["starts"] = inputs["starts"].astype(jnp.int8)
    outputs = _outputs(plan, arguments, shape)
    found = pl.pallas_call(
        functools.partial(_kernel, plan, shape, arithmetic_of(target), (*inputs, *outputs)),
        grid=(batch, *shape.tiles),
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        cost_estimate=plan.cost(arguments, list(outputs.values())),
        name=plan.name,
        interpret=target.interpret,
    )(*inputs.values())
    return [_summed(name, x, arguments) for name, x in zip(outputs, found, strict=True)]


def _outputs(plan: Plan, arguments: Arguments, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """What programs write. Sums over the numbers of the state are ``[B, tiles of numbers, T, D]``; sums over channels
    ``[B, tiles of channels, T, N]``; states ``[B, N, D]``, of which ``d_A`` has a gradient for each row of the batch; and
    ``before``, the states before blocks, ``[B, blocks, N, D]``."""
    state, (of_channels, of_numbers) = arguments.state, shape.tiles
    batch, wide = state.shape[0], state.dtype

    def in_time(like: Any) -> jax.ShapeDtypeStruct:
        dtype = like.dtype if of_numbers == 1 else wide
        return jax.ShapeDtypeStruct((batch, of_numbers, shape.length, shape.width), dtype)

    final = {"final": jax.ShapeDtypeStruct(state.shape, wide)}
    if plan.kind in ("summary", "state_gradient"):
        return final
    if plan.kind == "forward":
        before = jax.ShapeDtypeStruct((batch, pl.cdiv(shape.length, shape.block.kept), *state.shape[1:]), wide)
        return {"y": in_time(arguments.x), **final, **({"before": before} if plan.keep else {})}
    sums = jax.ShapeDtypeStruct((batch, of_channels, shape.length, shape.states), wide)
    rates = {"d_A": jax.ShapeDtypeStruct(state.shape, wide)} if plan.rates else {}
    return {"d_x": in_time(arguments.x), "d_dt": in_time(arguments.dt), "d_B": sums, "d_C": sums, **final, **rates}


def _summed(name: str, x: jax.Array, arguments: Arguments) -> jax.Array:
    if name in ("final", "before"):
        return x
    if name == "d_A":
        return jnp.sum(x, axis=0)
    x = x[:, 0] if x.shape[1] == 1 else jnp.sum(x, axis=1)
    like: Any = {"y": arguments.x, "d_x": arguments.x, "d_dt": arguments.dt}.get(name, x)
    return x.astype(like.dtype)


def _kernel(plan: Plan, shape: Shape, arithmetic: Arithmetic, names: tuple[str, ...], *refs) -> None:
    tile = Tile(plan, shape, arithmetic, dict(zip(names, refs, strict=True)))
    state = tile.states("state")
    if plan.kind == "gradient":
        final, d_A = _over_time(tile, _gradients, (state, jnp.zeros_like(state)))
        if plan.rates:
            tile.store_states("d_A", d_A)
    else:
        final = _over_time(tile, functools.partial(_states, tile.rates()), state)
    tile.store_states("final", final)


def _over_time(tile: Tile, piece, carry):
    """``carry, following = piece(tile, first token, rows, carry, ask)`` for a few tokens at a time; ``following`` is the
    result of ``ask()``, the rows of the next piece. Tokens beyond the last change nothing."""
    count = pl.cdiv(tile.shape.length, tile.shape.block.rows)

    def start_of(i):
        """The start of the i-th piece processed; beyond the last, that of the last again."""
        i = jnp.minimum(i, count - 1)
        return (count - 1 - i if tile.plan.reverse else i) * tile.shape.block.rows

    def body(i, both):
        carry, loaded = both
        return piece(tile, start_of(i), loaded, carry, lambda: tile.rows(start_of(i + 1)))

    first = carry, tile.rows(start_of(jnp.int32(0)))
    return lax.fori_loop(jnp.int32(0), jnp.int32(count), body, first)[0]


def _states(A, tile: Tile, start, rows: list[Row], state, ask):
    """For every pass except that of all gradients."""
    following = ask()
    if tile.plan.keep:
        tokens = jnp.int32(tile.shape.block.kept)
        tile.store_states("before", state, lax.div(start, tokens), when=lax.rem(start, tokens) == 0)
    for j in reversed(range(len(rows))) if tile.plan.reverse else range(len(rows)):
        row = tile.widened(rows[j])
        if tile.plan.reverse:
            state = _transition(tile, row, A) * tile.fma(row.C, row.d_y, state)
            continue
        state = _after(tile, row, A, state)
        if tile.plan.kind == "forward":
            tile.store_channels("y", over_numbers(state * row.C), start + j)
    return state, following


def _gradients(tile: Tile, start, rows: list[Row], carry, ask):
    A, following = tile.rates(), None
    states = [_state_before(tile, A, start)]
    for j, row in enumerate(map(tile.widened, rows)):
        states.append(_after(tile, row, A, states[-1]))
        tile.store_numbers("d_C", over_lanes(over_channels(states[-1] * row.d_y)), start + j)
    again = _again(tile, start, rows, len(rows) - 1)
    for j in reversed(range(len(rows))):
        row = tile.widened(again)
        if j:
            again = _again(tile, start, rows, j - 1)
        else:
            following = ask()
        carry = _gradient(tile, start + j, row, tile.rates(), states[j], carry)
    return carry, following


def _again(tile: Tile, start, rows: list[Row], j: int) -> Row:
    """Row j with some fields loaded again, after something was stored, so that the compiler does not know they are the
    same. Otherwise it would keep the transitions of all rows from when the states were computed. There are too few
    registers for these and, where a lane has most of the state, for other arrays too."""
    return rows[j]._replace(**{name: tile.load(name, start + j) for name in tile.shape.block.again})


def _state_before(tile: Tile, A, start):
    """The state before a piece: from the one before its block, through the block's earlier tokens."""
    rows, tokens = tile.shape.block.rows, tile.shape.block.kept
    block = lax.div(start, jnp.int32(tokens))

    def body(i, state):
        for row in tile.rows(block * tokens + i * rows):
            state = _after(tile, tile.widened(row), A, state)
        return state

    earlier = lax.div(start - block * tokens, jnp.int32(rows))
    return lax.fori_loop(jnp.int32(0), earlier, body, tile.states("before", block))


# Functions of a widened row and the rates A, None if there are none


def _transition(tile: Tile, row: Row, A):
    """a. Forgetting the state takes no extra instruction for each of its numbers."""
    if A is not None:
        exponent = tile.fma(row.dt, A, tile.unless_start(row, tile.constant(0), tile.constant(-jnp.inf)))
        return tile.exp2(exponent)
    dt, one = (tile.unless_start(row, y, jnp.zeros_like(y)) for y in (row.dt, tile.constant(1)))
    return tile.fma(-dt, row.B * row.B, one)


def _after(tile: Tile, row: Row, A, state):
    return tile.fma(_transition(tile, row, A), state, (row.dt * row.x) * row.B)


def _gradient(tile: Tile, t, row: Row, A, before, carry):
    """Stores the gradients of token t. ``before``: the state before it; ``carry``: the gradients from what follows the
    token, of the state after it and of A."""
    d_state, d_A = carry
    d_state = tile.fma(row.C, row.d_y, d_state)
    d_written = over_numbers(d_state * row.B)
    d_B = over_channels(d_state * (row.dt * row.x))
    passed = _transition(tile, row, A) * d_state
    if A is not None:
        d_exponent = passed * before
        d_A = tile.fma(d_exponent, row.dt, d_A)
        d_dt = math.log(2) * over_numbers(d_exponent * A)
    else:
        d_a, nothing = d_state * before, tile.constant(0)
        d_dt = -tile.unless_start(row, over_numbers(d_a * (row.B * row.B)), nothing)
        d_B -= 2 * row.B * over_channels(d_a * tile.unless_start(row, row.dt, nothing))
    tile.store_numbers("d_B", over_lanes(d_B), t)
    tile.store_channels("d_x", row.dt * d_written, t)
    tile.store_channels("d_dt", row.x * d_written + d_dt, t)
    return passed, d_A
