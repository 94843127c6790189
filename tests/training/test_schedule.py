"""The learning rate's multiplier at chosen steps, by hand."""

import math

import numpy as np
import pytest

from jaxlinear.training.schedule import make_schedule
from tests.training import tiny


def schedule(name, steps=100, warmup=10, final=0.1, decay=0.2):
    keys = {"name": name, "warmup_steps": warmup, "final_fraction": final, "decay_fraction": decay}
    return make_schedule(tiny.config(training__steps=steps, **{f"schedule__{key}": x for key, x in keys.items()}))


# 89 steps lie between the end of the warm-up, step 10, and the last step, 99; 19 between 80 and 99.
@pytest.mark.parametrize(
    "name, values",
    [
        ("cosine", {10: 1, 54: 0.1 + 0.45 * (1 + math.cos(math.pi * 44 / 89)), 99: 0.1, 500: 0.1}),
        ("linear", {10: 1, 54: 1 - 0.9 * 44 / 89, 98: 1 - 0.9 * 88 / 89, 99: 0.1, 500: 0.1}),
        ("wsd", {10: 1, 50: 1, 80: 1, 81: 1 - 0.9 / 19, 90: 1 - 0.9 * 10 / 19, 99: 0.1, 500: 0.1}),
        ("constant", {10: 1, 54: 1, 99: 1, 500: 1}),
    ],
)
def test_by_hand(name, values):
    multiplier = schedule(name)
    for step, value in ({0: 0.1, 4: 0.5, 8: 0.9, 9: 1} | values).items():
        np.testing.assert_allclose(multiplier(step), value, rtol=1e-5, err_msg=f"step {step}")


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_the_shortest_runs(name):
    """Without a warm-up, the first step has the whole rate."""
    assert schedule(name, warmup=0)(0) == 1
    for steps, warmup in ((1, 0), (1, 1), (5, 5)):
        values = [float(schedule(name, steps=steps, warmup=warmup)(step)) for step in range(steps)]
        np.testing.assert_allclose(values, [(step + 1) / max(warmup, 1) for step in range(steps)], rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps, warmup", [(10, 9), (2, 1)])
def test_a_warmup_until_the_last_step_but_one(name, steps, warmup):
    multiplier = schedule(name, steps=steps, warmup=warmup)
    np.testing.assert_allclose([multiplier(steps - 2), multiplier(steps - 1)], [1, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "options, values",
    [
        *(({"decay": decay}, {98: 1, 99: 0.1, 500: 0.1}) for decay in (0.01, 0.004)),  # for one step at least
        ({"decay": 1.0}, {10: 1, 99: 0.1}),  # after the warm-up at the earliest
        ({"steps": 98}, {78: 1, 79: 1 - 0.9 / 19, 97: 0.1}),  # a fifth is 19.6, so from step 78 onwards
    ],
)
def test_how_long_wsd_decays(options, values):
    multiplier = schedule("wsd", **options)
    np.testing.assert_allclose([multiplier(step) for step in values], [*values.values()], rtol=1e-5)
