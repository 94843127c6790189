"""The learning rate's multiplier at chosen steps, by hand."""

import math

import numpy as np
import pytest

from jaxlinear.training.schedule import make_schedule
from tests.training import tiny


def schedule(name, steps=100, warmup=10, final=0.1, decay=0.2):
    return make_schedule(
        tiny.config(
            schedule__name=name,
            training__steps=steps,
            schedule__warmup_steps=warmup,
            schedule__final_fraction=final,
            schedule__decay_fraction=decay,
        )
    )


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
def test_without_a_warmup_the_first_step_has_the_whole_rate(name):
    assert schedule(name, warmup=0)(0) == 1


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (5, 5)])
def test_the_shortest_runs(name, steps, warmup):
    values = [float(schedule(name, steps=steps, warmup=warmup)(step)) for step in range(steps)]
    np.testing.assert_allclose(values, [(step + 1) / max(warmup, 1) for step in range(steps)], rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps, warmup", [(10, 9), (2, 1)])
def test_a_warmup_until_the_last_step_but_one(name, steps, warmup):
    multiplier = schedule(name, steps=steps, warmup=warmup)
    np.testing.assert_allclose([multiplier(steps - 2), multiplier(steps - 1)], [1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("decay", [0.01, 0.004])
def test_wsd_decays_for_one_step_at_least(decay):
    multiplier = schedule("wsd", decay=decay)
    np.testing.assert_allclose([multiplier(98), multiplier(99), multiplier(500)], [1, 0.1, 0.1], rtol=1e-5)


def test_wsd_decays_after_the_warmup_at_the_earliest():
    multiplier = schedule("wsd", decay=1.0)
    np.testing.assert_allclose([multiplier(10), multiplier(99)], [1, 0.1], rtol=1e-5)


def test_wsd_decays_for_the_nearest_number_of_steps():
    """A fifth of 98 is 19.6, so it decays from step 78 onwards."""
    multiplier = schedule("wsd", steps=98)
    np.testing.assert_allclose([multiplier(78), multiplier(79), multiplier(97)], [1, 1 - 0.9 / 19, 0.1], rtol=1e-5)
