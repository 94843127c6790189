"""The uncertainty of a fit, from the same fit to resampled runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from jaxlinear.sweeps.laws import parametric
from jaxlinear.sweeps.laws.parametric import Law

REPLICATES = 500
LEVEL = 0.95
FREEDOM = 3  # least degrees of freedom: with fewer, a fit nearly interpolates the runs, and its residuals say little
FEWEST = 5 + FREEDOM  # least number of runs from whose resampling a law's five constants can be judged

T = TypeVar("T")


class Interval(NamedTuple):
    """A value, and the bounds between which it lies with probability ``LEVEL``."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Fit(Generic[T]):
    """A fit to the runs, and the fits to resampled runs."""

    best: T
    replicates: tuple[T, ...]

    def interval(self, function: Callable[[T], float]) -> Interval:
        """The interval of any number computed from the fit. The bounds are percentiles."""
        return interval(function(self.best), [function(replicate) for replicate in self.replicates])


def interval(value: float, samples: Sequence[float]) -> Interval:
    """``value`` with percentiles of ``samples``, which may be infinite. If there are no samples, or too many are NaN, the
    bounds are NaN."""
    found = np.asarray(samples, np.float64)
    if not len(found) or np.isnan(found).mean() > 1 - LEVEL:
        return Interval(float(value), np.nan, np.nan)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found[~np.isnan(found)], [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(value), float(low), float(high))


def fit_law(parameters: Any, tokens: Any, losses: Any, *, replicates: int = REPLICATES, seed: int = 0) -> Fit[Law]:
    """``parametric.fit``, and fits to runs resampled with replacement, unless there are fewer than ``FEWEST`` runs.

    On synthetic losses with noise of 0.3 to 1%, intervals from resampled runs covered the truth as often as they should;
    those from resampled residuals covered it too seldom. So did those from six and seven runs: the law nearly interpolates
    them, and therefore most of the resampled ones.
    """
    best = parametric.fit(parameters, tokens, losses)
    x, y, z = parametric.log_points(parameters, tokens, losses)
    if len(x) < FEWEST:
        return Fit(best, ())
    random = np.random.default_rng(seed)
    laws: list[Law] = []
    with parametric.one_thread():
        while len(laws) < replicates:
            drawn = random.integers(len(x), size=len(x))
            if min(parametric.distinct(x[drawn]), parametric.distinct(y[drawn])) < 3:
                continue  # no law can be fitted to these
            laws.append(parametric.refit(best, x[drawn], y[drawn], z[drawn]))
    return Fit(best, tuple(laws))
