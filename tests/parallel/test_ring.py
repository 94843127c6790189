"""Attention whose keys and values go round the shards: outputs and gradients equal those of one device, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.costs import programs
from jaxlinear.ops.attention import op as attention
from jaxlinear.parallel import cost, operations, sharding
from tests import numerics, shards
from tests.shards import MESHES, T, make_mesh

B, H, K, V = 4, 4, 3, 5
# As elsewhere, but the reused id is that of a first document longer than a shard, and of one that begins within the shard
# after one that ends in the first.
AGAIN = np.repeat([7, 8, 7, 8, 7], [6, 1, 14, 7, 4])[None].astype(np.int32)
IDS = np.concatenate([shards.IDS[:3], AGAIN])
PAST = 7
# The past belongs to another document, to the first one from its third token on or from its first, or reuses an id.
PAST_IDS = np.array([[9] * 7, [9, 9, 0, 0, 0, 0, 0], [0] * 7, [7, 7, 9, 7, 7, 7, 7]], np.int32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Gives a shard several blocks, whose size does not divide it."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    monkeypatch.setattr(attention, "KEY_RUN", 3)


CASES = [
    (0, False, False, 1),
    (0, True, True, 2),
    (1, True, False, 4),
    (1, False, True, 1),
    (2, True, True, 2),
    (2, True, False, 1),
]


@pytest.mark.parametrize("mesh, packed, past, groups", CASES)
def test_is_that_of_one_device(mesh, packed, past, groups):
    random = np.random.default_rng(0)
    keys = (PAST + T) if past else T
    shapes = (B, T, H, K), (B, keys, groups, K), (B, keys, groups, V)
    inputs = tuple(random.standard_normal(shape) for shape in shapes)
    ids = jnp.asarray(IDS) if packed else None
    # Without ids, the tokens have the id 0, as have some of the past.
    all_ids = np.concatenate([PAST_IDS, IDS if packed else 0 * IDS], axis=1)

    def whole(q, k, v):
        return ops.causal_attention(q, k, v, scale=0.3, segment_ids=jnp.asarray(all_ids) if past else ids)

    def spread(q, k, v):
        if not past:
            return operations.causal_attention(q, k, v, scale=0.3, segment_ids=ids)
        earlier = k[:, :PAST], v[:, :PAST], jnp.asarray(PAST_IDS)
        options = {"scale": 0.3, "segment_ids": ids, "past": earlier}
        return operations.causal_attention(q, k[:, PAST:], v[:, PAST:], **options)

    cotangents = random.standard_normal((B, T, H, V))
    expected = numerics.run(numerics.with_gradients(whole), inputs, cotangents, dtype="float64")
    with sharding.use_mesh(make_mesh(MESHES[mesh]), attention="ring"):
        found = numerics.run(numerics.with_gradients(spread), inputs, cotangents, dtype="float64")
    numerics.assert_close(found, numerics.wide(expected), 1e-12)


def test_narrow_dtypes_are_summed_in_float32():
    """In bfloat16, the error is no larger than on one device: the rounding of the outputs and of the weights."""
    random = np.random.default_rng(1)
    inputs = tuple(numerics.normal(random, B, T, heads, width) for heads, width in ((H, K), (1, K), (1, V)))
    exact = numerics.run(ops.causal_attention, *inputs, dtype="float64")
    with sharding.use_mesh(make_mesh(MESHES[0]), attention="ring"):
        found = numerics.run(jax.jit(operations.causal_attention), *inputs, dtype="bfloat16")
    one = numerics.run(jax.jit(ops.causal_attention), *inputs, dtype="bfloat16")
    assert found.dtype == jnp.bfloat16
    errors = [np.max(np.abs(numerics.wide(x) - np.asarray(exact))) for x in (found, one)]
    assert errors[0] <= 1.1 * errors[1] < 0.05


def test_dtypes_may_differ():
    """Including the dtype of the past."""
    random = np.random.default_rng(2)
    shapes = (B, T, H, K), (B, T, 1, K), (B, T, 1, V), (B, PAST, 1, K), (B, PAST, 1, V)
    inputs = tuple(numerics.normal(random, *shape) for shape in shapes)
    cotangents = numerics.normal(random, B, T, H, V)

    def run(q, k, v, *past):
        return operations.causal_attention(q, k, v, past=(*past, jnp.asarray(PAST_IDS)))

    exact, gradients = numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype="float64")
    dtypes = "float32", "float64", "float32", "float32", "float64"
    with jax.enable_x64(True), sharding.use_mesh(make_mesh(MESHES[0]), attention="ring"):
        given = tuple(jnp.asarray(x, dtype) for x, dtype in zip(inputs, dtypes, strict=True))
        found, found_gradients = numerics.with_gradients(run)(given, cotangents)
    assert [x.dtype for x in (*found_gradients, found)] == [*dtypes, dtypes[2]]
    numerics.assert_close((found, found_gradients), numerics.wide((exact, gradients)), 1e-6)


def test_nothing_is_gathered(monkeypatch):
    """The compiled program has only permutes, and takes less memory than gathering, whose memory grows with T."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
    monkeypatch.setattr(attention, "KEY_RUN", 64)
    mesh, length = make_mesh(MESHES[0]), 4096
    place = jax.NamedSharding(mesh, jax.P(None, "sequence"))
    shapes = ((1, length, 2, 8), "float32"), *[((1, length, 1, 8), "float32")] * 2, ((1, length), "int32")

    def compiled(choice):
        def objective(q, k, v, ids):
            with sharding.use_mesh(mesh, attention=choice):
                return jnp.sum(operations.causal_attention(q, k, v, segment_ids=ids) ** 2)

        gradient = jax.jit(jax.grad(objective, argnums=(0, 1, 2)), out_shardings=place)
        return gradient.lower(*(jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes)).compile()

    both = [compiled(choice) for choice in ("ring", "all_gather")]
    ring, gathered = ({x.kind for x in programs.collectives(y.as_text(), mesh.shape)} for y in both)
    assert ring == {"collective-permute"} and "all-gather" in gathered
    block = 2 * 8 * 4 * length // 8  # bytes of a shard's keys and values
    temporary = [program.memory_analysis().temp_size_in_bytes for program in both]
    # The keys and values of eight shards and their gradients, against those of two and the gradients of a third.
    assert temporary[1] - temporary[0] >= 11 * block


def test_auto_gathers_what_fits(monkeypatch):
    mesh, q = make_mesh(MESHES[0]), jax.ShapeDtypeStruct((1, 32, 2, 8), jnp.float32)

    def chosen():
        with cost.explained() as lines, sharding.use_mesh(mesh):
            jax.eval_shape(lambda q: operations.causal_attention(q, q, q), q)
        assert lines[0].startswith("keys and values of 8 shards, 512 B each: ")
        return lines[0].split(": ")[1].split()[0]

    assert chosen() == "all_gather"
    monkeypatch.setattr(cost, "KEYS_AND_VALUES_BOUND", 1e-9)
    assert chosen() == "ring"
