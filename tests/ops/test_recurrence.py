"""The runner of chunks, on a family made for this test: full matrices, constants, and arrays without gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import SAVED, protocol
from tests import numerics

WIDTH = 3


@dataclasses.dataclass(frozen=True)
class Turning(protocol.Family):
    """S_t = A_t S_{t-1} + weights u_t, with A_t = 1 + turn_t and 0 where a document begins; o_t = sum(S_t read_t).

    ``inputs`` are turn ``[B, T, D, D]``, u and read ``[B, T, D]`` and starts ``[B, T]`` bool; ``constants`` are the weights
    ``[D]``; a state is ``{"s": [B, D]}``. A run holds the composed map up to each of its tokens.
    """

    def prepare(self, inputs, constants):
        turn, u, read, starts = inputs
        steps = jnp.where(
            starts[..., None, None], jnp.zeros_like(turn), jnp.eye(WIDTH, dtype=turn.dtype)[None, None] + turn
        )
        additions = constants[None, None] * u
        maps = [(steps[:, 0], {"s": additions[:, 0]})]
        for t in range(1, turn.shape[1]):
            maps.append(self.compose(maps[-1], (steps[:, t], {"s": additions[:, t]})))
        return maps, read

    def summarise(self, run):
        return run[0][-1]

    def compose(self, earlier, later):
        return later[0] @ earlier[0], self.advance(later, earlier[1])

    def advance(self, summary, state):
        return {"s": jnp.einsum("bij,bj->bi", summary[0], state["s"]) + summary[1]["s"]}

    def apply(self, run, state):
        states = jnp.stack([self.advance(one, state)["s"] for one in run[0]], axis=1)
        return jnp.sum(states * run[1], axis=-1)


def draw(length):
    random = np.random.default_rng(length)
    turn = 0.3 * random.standard_normal((2, length, WIDTH, WIDTH))
    u, read = random.standard_normal((2, 2, length, WIDTH))
    starts = (random.random((2, length)) < 0.1).astype(float)  # floats: all that is drawn is differentiated
    return turn, u, read, starts, random.standard_normal(WIDTH), random.standard_normal((2, WIDTH))


def step_by_step(turn, u, read, starts, weights, state):
    outputs = []
    for t in range(turn.shape[1]):
        kept = jnp.where(starts[:, t, None] > 0, jnp.zeros_like(state), state)
        state = kept + jnp.einsum("bij,bj->bi", turn[:, t], kept) + weights[None] * u[:, t]
        outputs.append(jnp.sum(state * read[:, t], axis=-1))
    return jnp.stack(outputs, axis=1), state


def in_chunks(turn, u, read, starts, weights, state, chunk):
    outputs, final = protocol.chunked(Turning(), chunk, (turn, u, read, starts > 0), weights, {"s": state})
    return outputs, final["s"]


@functools.cache
def expected(length):
    inputs = draw(length)
    cotangents = (
        numerics.normal(np.random.default_rng(1), 2, length),
        numerics.normal(np.random.default_rng(2), 2, WIDTH),
    )
    return inputs, cotangents, numerics.run(numerics.with_gradients(step_by_step), inputs, cotangents, dtype="float64")


# ``size``: bytes per group, for one chunk, some, or all. 22 tokens are 6 chunks of 4, in 6, 3 or 2 groups or one.
@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize(
    "length, chunk, size", [(22, 4, 0), (22, 4, 2_000), (22, 4, 3_500), (20, 5, 1 << 20), (3, 8, 0)]
)
@pytest.mark.parametrize("written_out", [1, 16])
def test_values_and_gradients(monkeypatch, length, chunk, size, written_out):
    monkeypatch.setattr(protocol, "_CPU_GROUP_BYTES", size)
    monkeypatch.setattr(protocol, "_CHUNKS_WRITTEN_OUT", written_out)
    inputs, cotangents, want = expected(length)
    run = numerics.with_gradients(functools.partial(in_chunks, chunk=chunk))
    numerics.assert_close(numerics.run(run, inputs, cotangents, dtype="float64"), numerics.wide(want), 1e-12)


def test_groups_are_equal_and_pad_nothing(monkeypatch):
    inputs = np.zeros((1, 22, 10), np.float32)
    groups = {}
    for size in (0, 200, 400, 600, 10_000):
        monkeypatch.setattr(protocol, "_CPU_GROUP_BYTES", size)
        groups[size] = protocol._groups(inputs, 4)
    assert groups == {0: (6, 4), 200: (6, 4), 400: (3, 8), 600: (2, 12), 10_000: (1, 24)}


def test_the_map_of_all_chunks_is_that_of_the_run():
    turn, u, read, starts, weights, _ = numerics.cast(draw(20), "float32")
    family, inputs = Turning(), (turn, u, read, starts > 0)
    by_chunk = protocol.by_chunk(family.summarise(family.prepare(protocol.split(inputs, 5), weights)), 2)
    one = family.summarise(family.prepare(inputs, weights))
    numerics.assert_close(protocol.whole(family, by_chunk), one, 1e-5)


def test_remat_saves_the_states_between_chunks(monkeypatch):
    """One loop over the chunks forward and one backward; the forward one is not repeated."""
    monkeypatch.setattr(protocol, "_CHUNKS_WRITTEN_OUT", 1)
    inputs = numerics.cast(draw(20), "float32")

    def loops(wrap):
        run = wrap(functools.partial(in_chunks, chunk=5))
        return str(jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(run(*x)[0] ** 2)))(*inputs)).count("scan[")

    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
    assert loops(functools.partial(jax.checkpoint, policy=policy)) == loops(lambda run: run) == 2
    assert loops(jax.checkpoint) == 3
