"""The diagonal scan for GPU, through Triton: one thread per channel, with the state in a register.

It is limited by how many bytes are in flight, so each thread processes many time steps at once and requests the next ones
before it works on those that have arrived.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts import complex_parts as parts
from jaxlinear.pallas.parts.complex_parts import Parts
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.scan import blocks
from jaxlinear.pallas.scan.plan import Arguments, Plan


def call(plan: Plan, arguments: Arguments, target: Target) -> list[jax.Array]:
    """The kernel's outputs, in the order of ``Plan.outputs``."""
    batch, length, width = arguments.x[0].shape
    lanes = blocks.GPU_CHANNELS
    rows = blocks.gpu_rows(plan.parts * (2 - plan.constant + plan.with_h) + plan.packed)
    inputs = [*arguments.a, *arguments.x]
    if plan.with_h:
        inputs += [*arguments.h, *arguments.before]
    inputs += arguments.state
    if plan.packed:
        inputs.append(arguments.starts.astype(jnp.int8))
    outputs = plan.outputs(arguments, sums=1)
    return pl.pallas_call(
        functools.partial(_kernel, plan, length, width, lanes, rows),
        grid=(batch, pl.cdiv(width, lanes)),
        out_shape=[shape for shape, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        cost_estimate=plan.cost(arguments, outputs),
        name=plan.name,
        interpret=target.interpret,
    )(*inputs)


def _kernel(plan: Plan, length: int, width: int, lanes: int, rows: int, *refs):
    remaining = iter(refs)

    def take():
        return tuple(next(remaining) for _ in range(plan.parts))

    a_refs, x_refs = take(), take()
    h_refs, before_refs = (take(), take()) if plan.with_h else ((), ())
    state_refs = take()
    starts_ref: Any = next(remaining) if plan.packed else None
    y_refs = take() if plan.emit else ()
    a_out_refs = take() if plan.with_h or not plan.emit else ()
    final_refs = take()

    b, first = pl.program_id(0), pl.program_id(1) * lanes
    channels = pl.ds(first, lanes)
    mask = None if width % lanes == 0 else first + jnp.arange(lanes, dtype=jnp.int32) < width
    wide = final_refs[0].dtype

    def at_channels(ref, at: tuple):
        return ref.at[(*map(jnp.int32, at), channels)]

    def load(refs: tuple, *at) -> Parts:
        other = None if mask is None else 0
        return tuple(plgpu.load(at_channels(ref, at), mask=mask, other=other) for ref in refs)

    def store(refs: tuple, value: Parts, *at) -> None:
        for ref, y in zip(refs, value, strict=True):
            plgpu.store(at_channels(ref, at), y.astype(ref.dtype), mask=mask)

    def widen(y: Parts) -> Parts:
        return tuple(z.astype(wide) for z in y)

    before = widen(load(before_refs, b)) if plan.with_h else None
    constant = widen(load(a_refs, 0, 0)) if plan.constant else None

    def loads(start, count: int):
        """For the steps from ``start``: a, x, the h before each in the direction of the recurrence, and the start mark."""
        steps = []
        for j in range(count):
            t = start + j
            a = () if plan.constant else load(a_refs, b, t)
            beside = jnp.maximum(t - 1, 0) if plan.reverse else jnp.minimum(t + 1, length - 1)
            h = load(h_refs, b, beside) if plan.with_h else ()
            steps.append((a, load(x_refs, b, t), h, plgpu.load(starts_ref.at[b, jnp.int32(t)]) if plan.packed else ()))
        return steps

    def kept(y: Parts, starts) -> Parts:
        """y unless the step forgets the state before it, even one that is not finite."""
        return parts.where(starts == 0, y, parts.zero(y)) if plan.packed else y

    def steps(start, loaded, carry):
        state, total = carry
        for j in reversed(range(len(loaded))) if plan.reverse else range(len(loaded)):
            a, x, h, starts = loaded[j]
            a, x, t = constant if plan.constant else widen(a), widen(x), start + j
            if plan.lagged:
                y = parts.plus(x, state)
                state = kept(parts.times(a, y), starts)
            else:
                y = state = parts.plus(parts.times(a, kept(state, starts)), x)
            if plan.emit:
                store(y_refs, y, b, t)
            if plan.with_h:
                d_a = parts.times(y, parts.where(t == (0 if plan.reverse else length - 1), before, widen(h)))
                d_a = kept(d_a, starts)
                if plan.constant:
                    total = parts.plus(total, d_a)
                else:
                    store(a_out_refs, d_a, b, t)
            elif not plan.emit:
                total = kept(parts.times(total, a), starts)
        return state, total

    state = widen(load(state_refs, b))
    none = parts.zero(state) if plan.with_h and plan.constant else ()
    carry = state, none if plan.emit else parts.one(state)
    count, tail = divmod(length, rows)

    def rest(carry):
        return steps(count * rows, loads(count * rows, tail), carry) if tail else carry

    def block(i):
        """Where the i-th block processed begins; beyond the last, the last one again."""
        i = jnp.minimum(i, count - 1)
        return (count - 1 - i if plan.reverse else i) * rows

    def body(i, both):
        carry, loaded = both
        following = loads(block(i + 1), rows)
        return steps(block(i), loaded, carry), following

    if plan.reverse:
        carry = rest(carry)
    if count:
        carry, _ = lax.fori_loop(0, count, body, (carry, loads(block(jnp.int32(0)), rows)))
    if not plan.reverse:
        carry = rest(carry)
    store(final_refs, carry[0], b, 0)
    if carry[1]:
        store(a_out_refs, carry[1], b, 0)
