"""What is best for a budget, against a search over sizes."""

import math

import numpy as np
import pytest

from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws import optimum
from jaxlinear.sweeps.laws.parametric import Law

LAW = Law(E=1.7, A=400.0, B=1200.0, alpha=0.34, beta=0.28)
COSTS = [optimum.Cost(), optimum.Cost(kappa=40.0, gamma=0.9)]
FLOPS = 1e19


@pytest.mark.parametrize("cost", COSTS)
def test_no_other_size_is_better(cost):
    """The exponents and the FLOPs for a loss are those of the optimum."""
    best, large = (optimum.compute_optimal(LAW, FLOPS * times, cost) for times in (1, 10))
    assert cost.per_token(best.parameters) * best.tokens == pytest.approx(FLOPS)
    sizes = np.geomspace(1e6, 1e11, 200_001)
    losses = LAW.loss(sizes, FLOPS / (cost.kappa * sizes**cost.gamma))
    assert best.loss == pytest.approx(losses.min(), abs=1e-9)
    assert best.parameters == pytest.approx(sizes[losses.argmin()], rel=1e-3)
    grown = math.log10(large.parameters / best.parameters), math.log10(large.tokens / best.tokens)
    assert grown == pytest.approx(optimum.exponents(LAW, cost))
    assert optimum.flops_for_loss(LAW, best.loss, cost) == pytest.approx(FLOPS)
    assert optimum.flops_for_loss(LAW, LAW.E, cost) == math.inf


def test_rule_of_thumb_is_equation_4_of_hoffmann():
    best = optimum.compute_optimal(LAW, FLOPS)
    scale = (0.34 * 400.0 / (0.28 * 1200.0)) ** (1 / 0.62)
    assert best.parameters == pytest.approx(scale * (FLOPS / 6) ** (0.28 / 0.62))
    assert best.tokens == pytest.approx((FLOPS / 6) ** (0.34 / 0.62) / scale)
    assert optimum.exponents(LAW) == pytest.approx((0.28 / 0.62, 0.34 / 0.62))


def test_more_flops_than_a_float_holds():
    law = Law(2, 30, 30, 0.3, 0.02)
    assert optimum.flops_for_loss(law, 2.0000001) == math.inf
    assert math.isfinite(optimum.flops_for_loss(law, 3.0))


@pytest.mark.parametrize("A, B", [(1e9, 1e-6), (1e-6, 1e9)])
def test_an_optimum_beyond_what_a_float_holds(A, B):
    """Resampled runs with much noise may have one: it is one end of an interval, not an error."""
    found = optimum.compute_optimal(Law(2, A, B, 0.02, 0.02), 1e18, optimum.Cost(6.0, 0.11))
    assert 0 < found.parameters < math.inf and 0 < found.tokens < math.inf and math.isfinite(found.loss)


def test_an_architecture_that_needs_half_the_flops():
    """The same law, with each FLOP worth two: N and D for C equal those of the other for 2 C."""
    half = optimum.Cost(kappa=3.0)
    assert optimum.compute_multiplier(LAW, half, LAW, optimum.Cost(), FLOPS) == pytest.approx(2)


def test_cost_from_flops_as_counted():
    parameters = np.array([1e6, 3e6, 1e7])
    found = optimum.Cost.of(parameters, 30 * parameters**0.8)
    assert (found.kappa, found.gamma) == pytest.approx((30, 0.8))
    alike = optimum.Cost.of([1e6, 1e6], [6.6e6, 6.6e6])
    assert (alike.kappa, alike.gamma) == pytest.approx((6.6, 1))


@pytest.mark.parametrize("gamma, said", [(-0.2, "-0.2"), (0.0, "0"), (0.05, "0.05")])
def test_parameters_that_cost_nothing_have_no_best_number(gamma, said):
    cost = optimum.Cost.of([1e7, 1e8, 1e9], 6e7 * np.array([1.0, 10.0, 100.0]) ** gamma)
    with pytest.raises(UserError, match=rf"^FLOPs per token grow as N\^{said}, so no size is the best"):
        cost.check_grows()
    optimum.Cost(gamma=0.1).check_grows()
