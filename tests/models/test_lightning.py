"""Lightning attention: its its decays, which do not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear import config_checks
from jaxlinear.models.parameters import describe
from jaxlinear.training.optimizer import make_optimizer
from tests import numerics, small

SIZES = {"pattern": ("lightning", "rg_lru", "lightning"), "num_layers": 7, "num_heads": 4}


def test_the_decays_by_head_and_layer():
    """Both in the scan and outside it: layers 0, 2, 3, 5 and 6 of 7."""
    parameters = numerics.jit(describe(small.config(**SIZES)).initialise)(jax.random.key(0))
    periods, rest = (parameters["stacks"][i]["blocks"] for i in range(2))
    found = {0: periods[0], 2: periods[2], 3: periods[0], 5: periods[2], 6: rest[0]}
    for layer, block in found.items():
        decay = block["mixer"]["log_decay"][layer // 3 % 2]
        expected = np.array([-8 * (h + 1) / 4 * (1 - layer / 7) for h in range(4)])
        numerics.assert_close(decay, expected, 1e-6)


@functools.cache
def gradients():
    """The gradients of two scanned layers, with their parameters."""
    architecture = describe(small.config(pattern=("lightning",), num_layers=2))
    parameters = numerics.jit(architecture.initialise)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)
    loss = lambda parameters: jnp.mean(architecture.bind(parameters)(tokens)[0] ** 2)  # noqa: E731
    return architecture, parameters, numerics.jit(jax.grad(loss))(parameters)


@pytest.mark.parametrize("name", config_checks.OPTIMIZERS)
def test_training_leaves_the_decays_as_they_are(name):
    architecture, parameters, gradient = gradients()
    config = configs.default()
    config.optimizer.name = name
    config.schedule.warmup_steps = 0
    optimizer = make_optimizer(config, architecture)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update = numerics.jit(lambda *trees: optimizer.update(trees[0], optimizer.init(trees[1]), trees[1])[0])
        updates = update(gradient, parameters)["stacks"][0]["blocks"][0]["mixer"]
    assert not updates["log_decay"].any() and updates["query"]["kernel"].any()
