"""Parabolas at fixed FLOPs, and the power law through their minima."""

import numpy as np
import pytest

from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws import isoflop, optimum
from tests.sweeps.test_parametric import TRUTH

BUDGETS = np.repeat(np.geomspace(1e17, 1e20, 4), 6)
BEST = 0.2 * BUDGETS**0.48
PARAMETERS = BEST * np.tile(np.geomspace(0.3, 4, 6), 4)
LOSSES = 2 + 1e3 * BUDGETS**-0.2 + 0.03 * np.log(PARAMETERS / BEST) ** 2


def test_exact_parabolas():
    found = isoflop.fit(BUDGETS, PARAMETERS, LOSSES, replicates=20)
    assert (found.best.power, found.best.scale) == pytest.approx((0.48, 0.2), rel=1e-6)
    for parabola, budget in zip(found.best.parabolas, np.unique(BUDGETS), strict=True):
        assert parabola.inside
        assert parabola.best == pytest.approx(0.2 * budget**0.48)
        assert parabola.at == pytest.approx(2 + 1e3 * budget**-0.2)
        assert parabola.loss(2 * parabola.best) == pytest.approx(parabola.at + 0.03 * np.log(2) ** 2)
    assert found.interval(lambda profile: profile.power) == pytest.approx((0.48, 0.48, 0.48), rel=1e-6)


def test_intervals_cover_the_truth():
    """Losses of the parametric law near its optimum, with noise: alpha and beta give the exponent of N."""
    truth, covered = optimum.exponents(TRUTH)[0], 0
    best = np.array([optimum.compute_optimal(TRUTH, budget).parameters for budget in BUDGETS])
    parameters = best * np.tile(np.geomspace(0.3, 3.3, 6), 4)
    losses = TRUTH.loss(parameters, BUDGETS / (6 * parameters))
    for seed in range(20):
        noise = np.exp(0.002 * np.random.default_rng(seed).standard_normal(len(losses)))
        found = isoflop.fit(BUDGETS, parameters, losses * noise, replicates=100, seed=seed)
        low, high = found.interval(lambda profile: profile.power)[1:]
        covered += low <= truth <= high
        assert high - low < 0.1
    assert covered >= 18


def test_replicates_are_as_far_apart_as_the_runs_of_a_law():
    """With 6 runs and 3 constants, parabolas have half the variance of the noise. The residuals have less, and say with 12
    degrees of freedom what it is up to a factor, whose mean is 12 / (12 - 2)."""
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(LOSSES))
    found = isoflop.fit(BUDGETS, PARAMETERS, LOSSES + noise, replicates=400)
    sizes = PARAMETERS.reshape(4, 6)

    def fitted(profile):
        return np.array([parabola.loss(n) for parabola, n in zip(profile.parabolas, sizes, strict=True)])

    residuals = (LOSSES + noise).reshape(4, 6) - fitted(found.best)
    variance = np.mean([(fitted(replicate) - fitted(found.best)) ** 2 for replicate in found.replicates])
    assert variance == pytest.approx(np.sum(residuals**2) / (24 - 4 * 3 - 2) * 3 / 6, rel=0.1)


def test_a_minimum_outside_the_sizes_does_not_count():
    last = np.isclose(BUDGETS, BUDGETS[-1])
    far = np.where(last, 2 + 0.03 * np.log(PARAMETERS / (20 * BEST)) ** 2, LOSSES)
    found = isoflop.fit(BUDGETS, PARAMETERS, far, replicates=0).best
    assert [parabola.inside for parabola in found.parabolas] == [True, True, True, False]
    assert found.parabolas[-1].best == PARAMETERS[-1] and found.parabolas[-1].at == far[-1]
    assert found.power == pytest.approx(0.48)


@pytest.mark.parametrize("minima", [0, 1])
def test_without_two_minima_there_is_no_power_law(minima):
    losses = np.where(np.arange(24) < 6 * minima, LOSSES, np.log(PARAMETERS))
    found = isoflop.fit(BUDGETS, PARAMETERS, losses, replicates=3)
    assert [parabola.inside for parabola in found.best.parabolas] == [True] * minima + [False] * (4 - minima)
    assert np.isnan([found.best.power, found.best.scale]).all()
    assert np.isnan(found.interval(lambda profile: profile.power)).all()


@pytest.mark.parametrize("budgets_of_four, replicates", [(0, 0), (2, 0), (3, 5)])
def test_three_sizes_leave_no_interval(budgets_of_four, replicates):
    """Nor does a fourth at one or two of the budgets: so few runs leave too few residual degrees of freedom."""
    keep = np.tile([True, False, True, False, True, False], 4)
    keep[1 : 6 * budgets_of_four : 6] = True
    found = isoflop.fit(BUDGETS[keep], PARAMETERS[keep], LOSSES[keep], replicates=5)
    assert found.best.power == pytest.approx(0.48)
    assert len(found.replicates) == replicates


def test_two_sizes_are_refused():
    with pytest.raises(UserError, match=r"at least 3 sizes; the budget of 1e\+17 FLOPs has 2"):
        isoflop.fit(BUDGETS[:2], PARAMETERS[:2], LOSSES[:2])
