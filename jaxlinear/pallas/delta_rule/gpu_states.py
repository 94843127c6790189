"""The delta rule for GPU, through Triton: the states, chunk by chunk of one head, for a tile of values.

    X = U - W S,   O = scale (P X + Q S),   S' = whole S + E^T X
    dX = P^T dO + E dS',   dS = whole dS' + Q^T dO - W^T dX

States are ``[V, K]``. A program has some of their rows, and its products run over all of K. Q and E are decayed queries and
keys. Unless the decay is by channel, they are q and k, and the decay is applied to the rows of these products, or to what
E^T and Q^T multiply.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxlinear.pallas.parts.gpu_chunk import Place
from jaxlinear.pallas.parts.gpu_layout import Layout, dot, scaled, span, times
from jaxlinear.pallas.parts.products import dot_terms, pairs, terms


def forward_kernel(layout: Layout, names: tuple[str, ...], *refs) -> None:
    """From the state before the first chunk: the state after the last, and whichever else is named: ``o``, ``written`` (X),
    ``before`` (the states before each chunk). Without ``u``, U is zero."""
    named, plan = dict(zip(names, refs, strict=True)), layout.plan
    first, h, b = pl.program_id(0) * layout.states_tile, pl.program_id(1), pl.program_id(2)
    values = layout.states_tile

    def step(n, state):
        place = Place(layout, n, h, b)
        narrow_state = state.astype(plan.narrow)
        if "before" in named:
            plgpu.store(_at(named["before"], (b, n, h), first, layout), narrow_state)
        written = -dot(place.load(named["w"], 0, layout.keys), narrow_state, (1, 1), layout)
        if "u" in named:
            written = written + place.load(named["u"], first, values).astype(plan.wide)
        wide_written, written = written, written.astype(plan.narrow)
        if "written" in named:
            place.store(named["written"], first, written)
        if "o" in named:
            o = dot(place.load(named["attention"], 0, layout.chunk), written, (1, 0), layout)
            queries, since_start = _decayed(place, named, "queries")
            o = o + times(since_start, dot(queries, narrow_state, (1, 1), layout))
            place.give(named["o"], first, jnp.asarray(plan.scale, o.dtype) * o)
        ends, until_end = _decayed(place, named, "ends")
        if plan.terms == 1:
            added = dot(scaled(written, until_end), ends, (0, 0), layout)
        else:
            reaches = terms(times(until_end, wide_written), plan.narrow, plan.terms)
            added = dot_terms(reaches, (ends,), (0, 0), plan.wide)
        return _whole(layout, named, place) * state + added

    state = plgpu.load(_at(named["state"], (b, h), first, layout))
    state = lax.fori_loop(jnp.int32(0), jnp.int32(layout.chunks), step, state)
    plgpu.store(_at(named["final"], (b, h), first, layout), state)


def backward_kernel(layout: Layout, names: tuple[str, ...], *refs) -> None:
    """From the gradient of the state after the last chunk: that of the state before the first, and whichever else is named:
    ``d_written`` (dX), ``d_after`` (the gradients of the states after each chunk)."""
    named, plan = dict(zip(names, refs, strict=True)), layout.plan
    first, h, b = pl.program_id(0) * layout.states_tile, pl.program_id(1), pl.program_id(2)

    def step(i, d_state):
        n = layout.chunks - 1 - i
        place = Place(layout, n, h, b)
        narrow_d = d_state.astype(plan.narrow)
        if "d_after" in named:
            plgpu.store(_at(named["d_after"], (b, n, h), first, layout), narrow_d)
        d_o = scaled_cotangent(place, named["d_o"], first, layout.states_tile)
        d_written = dot(place.load(named["attention"], 0, layout.chunk), d_o, (0, 0), layout)
        (ends, until_end), (queries, since_start) = (_decayed(place, named, name) for name in ("ends", "queries"))
        d_written = d_written + times(until_end, dot(ends, narrow_d, (1, 1), layout))
        if "d_written" in named:
            place.store(named["d_written"], first, d_written)
        read = dot(scaled(d_o, since_start), queries, (0, 0), layout)
        d_terms = terms(d_written, plan.narrow, plan.terms)
        for pair in pairs(d_terms, (place.load(named["w"], 0, layout.keys),)):
            read = read - dot(*pair, (0, 0), layout)
        return _whole(layout, named, place) * d_state + read

    state = plgpu.load(_at(named["state"], (b, h), first, layout))
    state = lax.fori_loop(jnp.int32(0), jnp.int32(layout.chunks), step, state)
    plgpu.store(_at(named["d_state"], (b, h), first, layout), state)


def scaled_cotangent(place: Place, ref, first: int, tile: int):
    """The gradient of the outputs, without the scale, ``[c, tile]``, in the dtype of products."""
    plan = place.layout.plan
    d_o = place.given(ref, first, tile).astype(plan.wide)
    return (jnp.asarray(plan.scale, plan.wide) * d_o).astype(plan.narrow)


def _decayed(place: Place, named, name: str):
    """Queries, or the keys that reach the end: ``[c, K]``, and the decay ``[c, 1]`` that remains to be multiplied."""
    if place.layout.plan.decay == "channel":
        return place.load(named[name], 0, place.layout.keys), None
    tokens, factor = {"queries": ("q", "since_start"), "ends": ("k", "until_end")}[name]
    decay = place.numbers(named[factor])[:, None] if factor in named else None
    return place.given(named[tokens], 0, place.layout.keys), decay


def _at(ref, place: tuple, first, layout: Layout):
    """Some rows of a state."""
    return ref.at[(*place, span(first, layout.states_tile), span(0, layout.keys))]


def _whole(layout: Layout, named, place: Place):
    """``[1, K or 1]``"""
    width = layout.keys if layout.plan.decay == "channel" else 1
    return plgpu.load(named["whole"].at[place.b, place.h, place.n, span(0, width)])[None]
