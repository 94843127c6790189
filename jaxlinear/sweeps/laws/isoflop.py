"""IsoFLOP profiles: for each budget a parabola of the loss over log N, whose minimum is the best size (Hoffmann et al.
2022, arXiv:2203.15556, approach 2), and a power law of the budget through the minima."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws.bootstrap import FREEDOM, REPLICATES, Fit

_LEAST = 3  # sizes needed for a parabola


@dataclasses.dataclass(frozen=True)
class Parabola:
    """loss = square x^2 + slope x + constant with x = log N; its minimum is ``at``, reached at N = ``best``.

    ``inside`` says whether the minimum lies within the range of sizes that were tried. If not, ``best`` is the best of
    these sizes and ``at`` its loss.
    """

    flops: float
    square: float
    slope: float
    constant: float
    best: float
    at: float
    inside: bool

    def loss(self, parameters) -> np.ndarray:
        """The parabola's loss in nats per token."""
        return np.polyval([self.square, self.slope, self.constant], np.log(parameters))


@dataclasses.dataclass(frozen=True)
class Profile:
    """The parabolas, and ``N_best = scale * flops ** power`` fitted through the minima that are inside. With fewer than two
    of these, power and scale are NaN."""

    parabolas: tuple[Parabola, ...]
    power: float
    scale: float

    def best(self, flops: float) -> float:
        """N of the best size for a budget, by the power law."""
        return self.scale * flops**self.power


def fit(
    budgets: Sequence[float],
    parameters: Sequence[float],
    losses: Sequence[float],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Fit[Profile]:
    """The profile of runs, each given by its budget, N and L.

    In a replicate every run gets a residual drawn from those of all budgets: one budget has too few runs to draw from.
    Residuals are scaled by the square root of the number of runs over a draw from chi-squared with the degrees of freedom
    that the parabolas leave: so uncertain is the noise's variance, and intervals become those of Student's t. If fewer than
    ``FREEDOM`` are left (three sizes per budget leave none) there are no replicates.

    Raises:
      UserError: a budget has fewer than three sizes.
    """
    c, n, z = (np.asarray(values, np.float64) for values in (budgets, parameters, losses))
    groups = [np.flatnonzero(c == budget) for budget in np.unique(c)]
    for group in groups:
        sizes = len(np.unique(n[group]))
        if sizes < _LEAST:
            raise UserError(
                f"a parabola needs at least {_LEAST} sizes; the budget of {c[group[0]]:.3g} FLOPs has {sizes}"
            )
    best = _profile(c, n, z, groups)
    fitted = np.empty_like(z)
    for parabola, group in zip(best.parabolas, groups, strict=True):
        fitted[group] = parabola.loss(n[group])
    freedom = len(z) - 3 * len(groups)
    if freedom < FREEDOM:
        return Fit(best, ())
    random = np.random.default_rng(seed)
    scales = np.sqrt(len(z) / random.chisquare(freedom, replicates))
    drawn = (fitted + scale * random.choice(z - fitted, len(z)) for scale in scales)
    return Fit(best, tuple(_profile(c, n, losses, groups) for losses in drawn))


def _profile(c: np.ndarray, n: np.ndarray, z: np.ndarray, groups: list[np.ndarray]) -> Profile:
    parabolas = tuple(_parabola(c[group[0]], n[group], z[group]) for group in groups)
    inside = [parabola for parabola in parabolas if parabola.inside]
    if len(inside) < 2:
        return Profile(parabolas, np.nan, np.nan)
    logs = np.log([[parabola.flops, parabola.best] for parabola in inside])
    power, scale = np.polyfit(logs[:, 0], logs[:, 1], 1)
    return Profile(parabolas, float(power), float(np.exp(scale)))


def _parabola(flops: float, n: np.ndarray, z: np.ndarray) -> Parabola:
    x = np.log(n)
    square, slope, constant = map(float, np.polyfit(x, z, 2))
    vertex = -slope / (2 * square) if square > 0 else np.inf
    inside = bool(x.min() <= vertex <= x.max())
    if inside:
        best, at = float(np.exp(vertex)), constant + slope * vertex / 2
    else:
        best, at = float(n[np.argmin(z)]), float(z.min())
    return Parabola(float(flops), square, slope, constant, best, at, inside)
