"""Meshes and the sharding rules; a model on 8 devices gives the same numbers as on one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlinear.costs import programs, targets
from jaxlinear.errors import UserError
from jaxlinear.models.parameters import describe
from jaxlinear.ops import cross_entropy
from jaxlinear.ops.cross_entropy import linear_cross_entropy
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import operations, sharding
from tests import numerics, small

ONES = dict.fromkeys(meshes.AXES, 1)


def name_of(sizes):
    return "_".join(f"{axis}{size}" for axis, size in sizes.items())


def mesh_of(**sizes):
    return meshes.make_mesh(ONES | sizes)


def test_make_mesh():
    assert dict(mesh_of(data=8).shape) == ONES | {"data": 8}
    assert dict(mesh_of(data=-1).shape) == ONES | {"data": 8}
    assert dict(mesh_of(data=2, fsdp=-1, tensor=2).shape) == ONES | {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(mesh_of(data=8, sequence=-1).shape) == ONES | {"data": 8}
    assert dict(meshes.make_mesh(ONES, jax.devices()[:1]).shape) == ONES
    assert list(mesh_of(data=4, tensor=2).devices.flat) == jax.devices()


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 4}, "a mesh of data 4 does not use each of the 8 available devices once"),
        ({"data": 3, "fsdp": -1}, "mesh.data=3 does not divide the 8 available devices"),
        ({"data": 16}, "does not use each of the 8 available devices once"),
        ({}, "a mesh of 1 does not use each of the 8 available devices once"),
        ({"data": -1, "tensor": -1}, "only one size of the mesh can be -1, not both mesh.data and mesh.tensor"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        mesh_of(**sizes)


def test_spec():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    spec = functools.partial(sharding.spec, mesh=mesh)
    assert spec(("batch", "time", None), (8, 16, 6)) == PartitionSpec(("data", "fsdp"), None, None)
    assert spec(("embed", "mlp"), (6, 10)) == PartitionSpec("fsdp", "tensor")
    assert spec(("vocab", "embed"), (31, 6)) == PartitionSpec(None, "fsdp")  # 2 does not divide 31
    assert spec(("batch",), (6,)) == PartitionSpec(None)  # 4 does not divide 6
    assert spec((None, "heads", "recurrent"), (3, 4, 2)) == PartitionSpec(None, "tensor", "tensor")
    assert spec(("time",), (16,), mesh=mesh_of(sequence=8)) == PartitionSpec("sequence")
    of_experts = mesh_of(fsdp=2, tensor=2, expert=2)
    assert spec(("batch", "time", None), (8, 16, 6), mesh=of_experts) == PartitionSpec(("fsdp", "expert"), None, None)
    kernel = ("expert", "embed", "mlp")
    assert spec(kernel, (4, 6, 10), mesh=of_experts) == PartitionSpec("expert", "fsdp", "tensor")
    assert spec((), ()) == PartitionSpec()
    with pytest.raises(ValueError, match="zip"):
        spec(("embed",), (6, 10))


def test_constrain():
    x = jnp.ones((8, 4, 6))
    assert sharding.constrain(x, "batch", "time", None) is x
    mesh = mesh_of(data=2, fsdp=4)
    with sharding.use_mesh(mesh):
        assert sharding.constrain(x, "batch", "time", None).sharding.spec == PartitionSpec(("data", "fsdp"), None, None)
        assert sharding.batch_groups() == 8
        with sharding.use_mesh(mesh_of(tensor=8)):
            assert sharding.batch_groups() == 1
        with sharding.use_mesh(mesh_of(data=2, tensor=2, expert=2)):
            assert sharding.batch_groups() == 4
        assert sharding.batch_groups() == 8
    assert sharding.batch_groups() == 1 and sharding.constrain(x, None, None, None) is x


ARCHITECTURE = functools.cache(
    lambda: describe(small.config(pattern=("rg_lru", "sliding_window"), num_layers=4, vocab_size=32))
)
BATCH = 8


@functools.cache
def batch():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (BATCH, 12)).astype(np.int32)
    ids = np.cumsum(random.random((BATCH, 12)) < 0.2, axis=1, dtype=np.int32)
    return tokens, np.roll(tokens, -1, axis=1), ids, random.random((BATCH, 12)).astype(np.float32) / 100


def loss(parameters, tokens, targets, ids, weights):
    model = ARCHITECTURE().bind(parameters)
    hidden, _, _ = model.hidden(tokens, ids)
    embedding, groups = model.embedding[...], sharding.batch_groups()
    return linear_cross_entropy(hidden, embedding, targets, weights, soft_cap=5.0, groups=groups)[1]


@functools.cache
def on_one_device():
    parameters = numerics.cast(small.parameters(ARCHITECTURE().shapes), "float32")
    return parameters, numerics.jit(jax.value_and_grad(loss))(parameters, *batch())


@pytest.mark.slow(but=["fsdp8", "fsdp2_tensor2_data2"])
@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}, {"fsdp": 2, "tensor": 2, "data": 2}],
    ids=name_of,
)
def test_8_devices_give_the_numbers_of_one(sizes):
    parameters, expected = on_one_device()
    mesh = mesh_of(**sizes)
    places, rows = ARCHITECTURE().shardings(mesh), meshes.batch_sharding(mesh)

    def run(*inputs):
        with sharding.use_mesh(mesh):
            return jax.value_and_grad(loss)(*inputs)

    placed = jax.device_put(parameters, places)
    jitted = numerics.jit(run, in_shardings=(places, rows, rows, rows, rows), out_shardings=(None, places))
    value, gradients = jitted(placed, *batch())
    numerics.assert_close((value, gradients), expected, 1e-5)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), gradients, places)))
    parts = [leaf for leaf in jax.tree.leaves(gradients) if leaf.addressable_shards[0].data.size < leaf.size]
    assert bool(parts) == (sizes != {"data": 8})


TABLE, TOKENS = (64, 16), (8, 4)  # [vocab, D], [B, T]


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"data": 2, "fsdp": 4},
        {"data": 2, "fsdp": 2, "expert": 2},
        {"fsdp": 2, "tensor": 2, "expert": 2},
        {"fsdp": 2, "sequence": 4},
    ],
    ids=name_of,
)
def test_what_is_looked_up_is_exchanged_and_not_the_embedding(sizes):
    random = np.random.default_rng(0)
    table, tokens = random.standard_normal(TABLE).astype(np.float32), random.integers(0, 64, TOKENS).astype(np.int32)
    weights = random.integers(-8, 8, (*TOKENS, 16)).astype(np.float32)
    expected = np.zeros(TABLE, np.float32)
    np.add.at(expected, tokens, weights)
    mesh = mesh_of(**sizes)

    def loss(table, tokens, weights):
        with sharding.use_mesh(mesh):
            return jnp.sum(operations.rows(table, tokens, jnp.bfloat16).astype(jnp.float32) * weights)

    rows = meshes.batch_sharding(mesh)
    places = jax.NamedSharding(mesh, sharding.spec(("vocab", "embed"), TABLE, mesh)), rows, rows
    run = numerics.jit(jax.value_and_grad(loss), in_shardings=places, out_shardings=(None, places[0]))
    compiled = run.lower(table, tokens, weights).compile()
    value, gradient = compiled(*map(jax.device_put, (table, tokens, weights), places))
    rounded = np.asarray(jnp.asarray(table).astype(jnp.bfloat16).astype(jnp.float32))
    assert float(value) == pytest.approx(np.sum(rounded[tokens] * weights), rel=1e-5)
    np.testing.assert_array_equal(gradient, expected)
    over = [c for c in programs.read(compiled, mesh).collectives if "fsdp" in c.axes]
    assert {c.kind for c in over if c.bytes > 4 * math.prod(TOKENS)} == {"all-to-all"}


def test_gradients_of_a_frequent_token_are_summed_in_float32():
    """In bfloat16, a sum of ones stops growing at 256."""
    gradient = jax.grad(lambda table: jnp.sum(operations.rows(table, jnp.zeros((8, 512), jnp.int32), jnp.bfloat16)))
    assert gradient(jnp.ones((4, 2)))[:, 0].tolist() == [4096, 0, 0, 0]


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("target", ["h100:4", "v5e:2x2"])
def test_the_loss_gathers_the_embedding_in_the_dtype_of_its_products(target, monkeypatch):
    """It sums the gradient in float32."""
    monkeypatch.setattr(cross_entropy, "_SLICE_ELEMENTS_ELSEWHERE", 1 << 15)  # four slices
    mesh = meshes.make_mesh(ONES | {"fsdp": 4}, targets.find(target).devices)
    place, rows = jax.NamedSharding(mesh, PartitionSpec(None, "fsdp")), meshes.batch_sharding(mesh)

    def loss(embedding, x, targets, weights):
        with sharding.use_mesh(mesh):
            return operations.linear_cross_entropy(x, embedding, targets, weights)[1]

    shapes = ((1024, 256), "float32"), ((4, 128, 256), "bfloat16"), ((4, 128), "int32"), ((4, 128), "float32")
    at = place, rows, rows, rows
    given = [jax.ShapeDtypeStruct(*shape, sharding=one) for shape, one in zip(shapes, at, strict=True)]
    compiled = jax.jit(jax.grad(loss), out_shardings=place).lower(*given).compile()
    collectives = programs.read(compiled, mesh).collectives
    assert [c.bytes for c in collectives if c.kind == "all-gather"] == [1024 * 256 // 4 * 2]
    assert sum(c.bytes for c in collectives if c.kind in ("reduce-scatter", "all-reduce")) == 1024 * 256 * 4
