"""The steps use the exchange between shards of time that the config chooses."""

import jax
import pytest

from jaxlinear.parallel import cost
from jaxlinear.training import state as states
from jaxlinear.training.optimizer import make_optimizer
from jaxlinear.training.step import make_loss_step, make_train_step
from tests.training import tiny

PATTERN = ("rg_lru", "attention")


@pytest.mark.parametrize("exchange, attention", [("auto", "auto"), ("doubling", "ring")])
def test_the_steps_follow_the_config(exchange, attention):
    """The training and evaluation steps explain their choices while they are traced; nothing is compiled."""
    choices = {"parallel__exchange": exchange, "parallel__attention": attention}
    config = tiny.config(model__pattern=PATTERN, **choices)
    architecture, mesh = tiny.architecture(PATTERN), tiny.mesh(8, sequence=8)
    optimizer = make_optimizer(config, architecture)
    state, batch = states.structs(architecture, optimizer, mesh), jax.eval_shape(tiny.batch)
    expected = {
        "states": "all_gather (auto" if exchange == "auto" else "doubling (as asked",
        "keys and values": "all_gather (auto" if attention == "auto" else "ring (as asked",
    }
    steps = [
        (make_train_step(config, architecture, optimizer, mesh), state),
        (make_loss_step(config, architecture, mesh), state.parameters),
    ]
    for step, argument in steps:
        with cost.explained() as lines:
            step.trace(argument, batch)
        found = {line.split(" of ")[0]: line.split(": ")[1].split(";")[0] for line in lines if not line.startswith(" ")}
        assert found == expected
