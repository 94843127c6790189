"""Training on 8 devices, however it is spread, follows training on one."""

import functools

import jax
import numpy as np
import pytest

from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import state as states
from jaxlinear.training.optimizer import make_optimizer
from tests.training import tiny

MESHES = [
    *({"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2}, {"fsdp": 2, "tensor": 2, "data": 2}),
    *({"sequence": 8}, {"data": 2, "sequence": 2, "tensor": 2}),  # shards of 2 tokens, windows of 4
]
IN_PARTS = [{"data": 2, "fsdp": 2, "sequence": 2}, {"data": 2, "sequence": 2, "tensor": 2}]
STEPS = 5


def train(mesh, microbatches=1):
    trainer = tiny.Trainer(tiny.config(optimizer__epsilon=1e-3, training__microbatches=microbatches), mesh)
    state, losses = trainer.state(), []
    for step in range(STEPS):
        state, metrics = trainer(state, tiny.batch(seed=step, padding=3))
        losses.append(metrics["loss"])
    return trainer, state, losses


@functools.cache
def on_one_device():
    _, state, losses = train(tiny.mesh())
    return tiny.host(state), losses


@pytest.mark.slow(but=["fsdp8", "tensor4_data2", "sequence8"])  # the others are like those of the tests below
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "_".join(f"{axis}{n}" for axis, n in sizes.items()))
def test_8_devices_follow_one(sizes):
    check_follows(tiny.mesh(8, **sizes), sizes)


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize("sizes", IN_PARTS, ids=str)
def test_8_devices_follow_one_in_microbatches(sizes):
    """Each copy of the parameters sums the gradients of its own rows, whose numbers of targets differ."""
    check_follows(tiny.mesh(8, **sizes), sizes, microbatches=2)


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "data": 2}, {"data": 2, "sequence": 2, "tensor": 2}], ids=str)
def test_8_devices_in_any_order_follow_one(sizes):
    """As on TPUs, where the mesh follows the torus."""
    devices = [jax.devices()[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    check_follows(meshes.make_mesh(tiny.ONES | sizes, devices), sizes)


def check_follows(mesh, sizes, microbatches=1):
    expected, losses = on_one_device()
    assert max(losses) - min(losses) > 1e-2
    trainer, state, got = train(mesh, microbatches)
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    tiny.assert_close(state.parameters, expected.parameters, atol=1e-4)
    jax.tree.map(_check_place, state, trainer.placed)
    on_a_device = [shard.data.size for x in jax.tree.leaves(state.optimizer) for shard in x.addressable_shards[:1]]
    share = sum(on_a_device) / sum(x.size for x in jax.tree.leaves(state.optimizer))
    parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert 1 / parts <= share < 1.5 / parts + 0.1, f"a device holds {share:.2f} of the moments"


def _check_place(x, place):
    assert x.sharding.is_equivalent_to(place, x.ndim)


def test_the_first_state_does_not_depend_on_the_mesh():
    """It is made where it belongs, with the same numbers as on one device."""
    architecture = tiny.architecture(("sliding_window",), 1)
    optimizer = make_optimizer(tiny.config(model__pattern=("sliding_window",), model__num_layers=1), architecture)
    spread, single = tiny.mesh(8, fsdp=8), tiny.mesh()
    state = states.initialise(architecture, optimizer, 3, spread)
    jax.tree.map(_check_place, state, states.shardings(architecture, optimizer, spread))
    assert len(state.parameters["embedding"].sharding.device_set) == 8
    assert not state.parameters["embedding"].sharding.is_fully_replicated
    tiny.assert_close(state, states.initialise(architecture, optimizer, 3, single), rtol=1e-6)
    assert np.std(state.parameters["embedding"]) > 0.1
