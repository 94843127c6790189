"""Muon with its matrices dealt out over the devices of a mesh equals optax's."""

import jax
import numpy as np
import pytest
from optax import contrib

from jaxlinear import config as configs
from jaxlinear.costs import targets, traced
from jaxlinear.models.parameters import describe
from jaxlinear.parallel import sharding
from jaxlinear.training import muon
from jaxlinear.training.optimizer import make_optimizer
from tests.training import tiny

OPTIONS = {"learning_rate": 0.1, "muon_learning_rate": 0.5, "clip_norm": 0.0, "weight_decay": 0.0, "epsilon": 1e-2}
OPTIONS = {"optimizer__name": "muon"} | {f"optimizer__{name}": value for name, value in OPTIONS.items()}
# Kernels of every kind: wide, tall and square, of heads and of experts, of stacked layers and of a single one.
SHAPES = {
    "layers": {"model__num_layers": 3},
    "experts": {
        "model__pattern": ("rg_lru",),
        "model__num_layers": 1,
        "model__channel_mixer": "mixture_of_experts",
        "model__experts": 4,
        "model__experts_per_token": 2,
        "model__expert_width": 48,
    },
}
MESHES = [
    ("layers", {}),
    ("layers", {"fsdp": 4}),
    ("layers", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("experts", {"sequence": 2, "fsdp": 2, "expert": 2}),
    ("experts", {"tensor": 4, "expert": 2}),
]


def of_optax(architecture):
    def numbers(path, _, axes):
        if not path[-1].key.endswith("kernel") or path[-1].key.startswith("convolution"):
            return None
        return contrib.MuonDimensionNumbers(len(axes) - 2, len(axes) - 1)

    tree = jax.tree_util.tree_map_with_path(numbers, architecture.shapes, architecture.axes)
    rates = {"adam_learning_rate": lambda _: 0.1, "adam_b2": 0.95, "eps": 1e-2}
    return contrib.muon(lambda _: 0.5, **rates, muon_weight_dimension_numbers=lambda _: tree)


@pytest.mark.slow(but=["layers-data-fsdp-tensor", "experts-tensor-expert"])
@pytest.mark.parametrize("shape, sizes", MESHES, ids=lambda x: "-".join(x) if isinstance(x, dict) else x)
def test_two_updates_are_those_of_optax_on_one_device(shape, sizes):
    config = tiny.config(**OPTIONS, **SHAPES[shape])
    architecture = describe(configs.model_config(config))
    parameters = tiny.parameters(architecture)
    optimizer, oracle = make_optimizer(config, architecture), of_optax(architecture)
    mesh = tiny.mesh(int(np.prod(list(sizes.values()), dtype=int)), **sizes)
    placed = architecture.shardings(mesh)

    def update(gradients, state):
        with sharding.use_mesh(mesh):
            return optimizer.update(gradients, state, parameters)

    state, expected_state = optimizer.init(parameters), oracle.init(parameters)
    step = jax.jit(update, in_shardings=(placed, None), out_shardings=(placed, None))
    whole = jax.jit(lambda gradients, state: oracle.update(gradients, state, parameters))
    for seed in (1, 2):
        gradients = tiny.parameters(architecture, seed)
        updates, state = step(gradients, state)
        expected, expected_state = whole(gradients, expected_state)
        tiny.assert_close(updates, expected, rtol=2e-4, atol=2e-5)
    moments = state[1][0].inner_states, expected_state.inner_states
    found, wanted = ([path for path, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in moments)
    assert found == wanted  # so their checkpoints are alike
    tiny.assert_close(*moments, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_no_product_is_computed_twice(sizes):
    """Eight layers on eight devices, each of which has some matrices of each shape."""
    config = tiny.config(**OPTIONS, model__pattern=("sliding_window",), model__num_layers=8)
    architecture = tiny.described(configs.model_config(config))
    parameters = tiny.parameters(architecture)
    optimizer = make_optimizer(config, architecture)
    counted = []
    for mesh in (tiny.mesh(), tiny.mesh(8, **sizes)):
        with sharding.use_mesh(mesh):
            counted.append(traced.products_of(optimizer.update, parameters, optimizer.init(parameters), parameters))
    assert counted[0] == counted[1]
    assert counted[0].flops > 1e6


@pytest.mark.usefixtures("optimised")
def test_nothing_is_dealt_out_between_slices():
    def axes(target, **sizes):
        return muon._fast_axes(tiny.meshes.make_mesh(tiny.ONES | sizes, targets.find(target).devices))

    assert axes("v5e:2x4", data=2, fsdp=4) == ("data", "fsdp")
    assert axes("2xv5e:2x2", data=2, fsdp=4) == ("fsdp",)
