"""The parametric law: known constants are recovered, and the intervals contain them."""

import re

import numpy as np
import pytest

from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws import bootstrap, parametric

# Besiroglu et al. 2024 (arXiv:2404.10102), table 1.
TRUTH = parametric.Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
NOISE = 0.005
DRAWS = 20


def ladder():
    """N and D of 35 runs: seven sizes at each of five budgets of 6 N D."""
    budgets, sizes = np.geomspace(1e17, 1e20, 5), np.geomspace(0.25, 4, 7)
    parameters = (0.1 * budgets[:, None] ** 0.5 * sizes).ravel()
    return parameters, np.repeat(budgets, len(sizes)) / (6 * parameters)


PARAMETERS, TOKENS = ladder()


def draw(seed, noise=NOISE):
    return TRUTH.loss(PARAMETERS, TOKENS) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(TOKENS)))


def test_intervals_cover_the_truth():
    """For each constant, in at least 18 of 20 noisy draws; it should be 95% of them."""
    truth, found = np.array([TRUTH.E, TRUTH.alpha, TRUTH.beta]), []
    for seed in range(DRAWS):
        fit = bootstrap.fit_law(PARAMETERS, TOKENS, draw(seed), replicates=200, seed=seed)
        intervals = [fit.interval(lambda law, name=name: getattr(law, name)) for name in ("E", "alpha", "beta")]
        found.append([(interval.low, interval.value, interval.high) for interval in intervals])
    low, value, high = np.moveaxis(found, -1, 0)
    covered = ((low <= truth) & (truth <= high)).sum(0)
    assert (covered >= 18).all(), covered
    assert ((low <= value) & (value <= high)).all()
    # They are not merely wide: E within 0.25 nats, the exponents within 0.08.
    assert (np.median(high - low, 0) < [0.25, 0.08, 0.08]).all(), np.median(high - low, 0)


def test_all_runs_are_resampled_as_often(monkeypatch):
    drawn = []
    monkeypatch.setattr(parametric, "refit", lambda law, *points: drawn.append(points) or law)
    losses = draw(0)
    bootstrap.fit_law(PARAMETERS, TOKENS, losses, replicates=400)
    runs = np.log([PARAMETERS, TOKENS, losses]).T
    times = [np.sum(np.all(run == np.concatenate(drawn, axis=1).T, axis=1)) for run in runs]
    assert sum(times) == 400 * len(runs) and np.all(np.abs(np.array(times) - 400) < 5 * 20)


def test_outliers_hardly_count():
    losses = draw(0, noise=1e-4)
    losses[[3, 17]] *= 1.3
    found = parametric.fit(PARAMETERS, TOKENS, losses)
    assert abs(found.E - TRUTH.E) < 0.01
    assert found.alpha == pytest.approx(TRUTH.alpha, abs=0.005)


def test_gradient_of_the_objective():
    x, y, z = parametric.log_points(PARAMETERS, TOKENS, draw(1))
    x, y = x - x.mean(), y - y.mean()
    theta = np.array([-1.0, -0.9, 0.5, 0.4, 0.3])
    _, gradient = parametric.objective(theta, x, y, z, 1e-3)
    for i, step in enumerate(1e-7 * np.eye(5)):
        up, down = (parametric.objective(theta + sign * step, x, y, z, 1e-3)[0] for sign in (1, -1))
        assert gradient[i] == pytest.approx((up - down) / 2e-7, rel=1e-5)


def test_objective_is_the_huber_loss_of_logarithms():
    theta, delta = np.array([-1.0, -0.9, 0.5, 0.4, 0.3]), 0.02
    x, y, z = np.array([0.0, 1.0, -1.0]), np.array([0.5, -0.5, 2.0]), np.array([0.9, 0.8, 0.95])
    value, _ = parametric.objective(theta, x, y, z, delta)
    expected = 0.0
    for i in range(3):
        law = np.exp(-1.0) * np.exp(-0.4 * x[i]) + np.exp(-0.9) * np.exp(-0.3 * y[i]) + np.exp(0.5)
        difference = abs(np.log(law) - z[i])
        expected += difference**2 / 2 if difference <= delta else delta * (difference - delta / 2)
    assert value * delta**2 == pytest.approx(expected, rel=1e-12)


SIZES = np.geomspace(1e7, 1e10, 10)


@pytest.mark.parametrize(
    "parameters, tokens, message",
    [
        (PARAMETERS[:5], TOKENS[:5], "needs at least 6 runs, not 5"),
        (np.repeat([1e6, 2e6], 4), TOKENS[:8], "needs at least 3 sizes, not 2"),
        (PARAMETERS[:8], np.repeat([1e8, 1.001e8], 4), "needs at least 3 numbers of tokens, not 1"),
        (np.repeat(SIZES[::3], 3), np.tile([0.95e9, 1e9, 1.05e9], 4), r"differ more in tokens: .* is only 0\.041$"),
        (PARAMETERS, TOKENS, "finite and above 0"),
    ],
)
def test_refusals(parameters, tokens, message):
    losses = np.linspace(3, 2, len(parameters))
    losses[2] = np.nan if len(parameters) == len(PARAMETERS) else losses[2]
    with pytest.raises(UserError, match=message):
        parametric.fit(parameters, tokens, losses)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_tokens_that_follow_from_the_size_are_refused(power):
    """For example, 20 tokens per parameter: which term falls with N and which with D is then arbitrary."""
    near = np.exp(0.05 * np.random.default_rng(0).standard_normal(10))
    with pytest.raises(UserError, match=r"^tokens follow from the size .* two or more numbers of tokens per") as found:
        parametric.fit(SIZES, 20e7 * (SIZES / 1e7) ** power * near, np.linspace(3, 2, 10))
    assert float(re.search(r"as N\^(\S+)\)", str(found.value)).group(1)) == pytest.approx(power, abs=0.03)


TWICE, ONCE = np.repeat(np.geomspace(1e7, 1e10, 6), 2), np.geomspace(1e7, 1e10, 9)


@pytest.mark.parametrize(
    "sizes, tokens, names, near",
    [
        (PARAMETERS, TOKENS, ["E", "A", "B", "alpha", "beta"], 2e-3),
        (TWICE, TWICE * np.tile([10.0, 40.0], 6), ["E", "alpha", "beta"], 5e-3),
        (ONCE, 1e20 / ONCE, ["alpha", "beta"], 2e-2),
    ],
    ids=["a ladder", "two numbers of tokens for a size", "one budget, where the signs of the exponents tell the terms"],
)
def test_without_noise_the_constants_are_found(sizes, tokens, names, near):
    found = parametric.fit(sizes, tokens, TRUTH.loss(sizes, tokens))
    for name in names:
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=near), name


def test_an_interval_leaves_out_one_in_forty_on_either_side():
    assert bootstrap.LEVEL == 0.95
    assert bootstrap.interval(0.5, np.random.default_rng(0).permutation(1001) + 1) == (0.5, 26, 976)
    assert bootstrap.interval(1.0, [0.5] * 50 + [np.inf] * 50) == (1.0, 0.5, np.inf)
    assert bootstrap.interval(1.0, [1.0] * 99 + [np.nan]) == (1.0, 1.0, 1.0)
    for too_few in ([], [1.0] * 9 + [np.nan]):
        assert np.isnan(bootstrap.interval(1.0, too_few)[1:]).all()
