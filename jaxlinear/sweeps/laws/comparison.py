"""Fits of several architectures, by both ways of counting parameters and FLOPs, and compute multipliers between them."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws import bootstrap, isoflop, optimum, parametric
from jaxlinear.sweeps.laws.bootstrap import Fit, Interval
from jaxlinear.sweeps.laws.optimum import Cost
from jaxlinear.sweeps.laws.parametric import Law
from jaxlinear.sweeps.laws.points import COUNTS, Point

BEYOND = 10  # the laws are also evaluated at this multiple of the largest budget


@dataclasses.dataclass(frozen=True)
class ArchitectureFit:
    """The fits of one architecture by one way of counting. ``refusals`` says why a fit is missing."""

    points: list[Point]
    cost: Cost
    law: Fit[Law] | None
    profile: Fit[isoflop.Profile] | None
    refusals: list[str]

    def constant(self, name: str) -> Interval:
        """A field of the law."""
        assert self.law is not None
        return self.law.interval(operator.attrgetter(name))

    def exponents(self) -> tuple[Interval, Interval]:
        """The powers of the FLOPs with which the optimal N and D grow under the law."""
        assert self.law is not None
        return (
            self.law.interval(lambda law: optimum.exponents(law, self.cost)[0]),
            self.law.interval(lambda law: optimum.exponents(law, self.cost)[1]),
        )

    def optimum(self, flops: float) -> dict[str, Interval]:
        """N, D and loss for the best use of ``flops`` under the law."""
        assert self.law is not None
        laws = [self.law.best, *self.law.replicates]
        value, *samples = (optimum.compute_optimal(law, flops, self.cost) for law in laws)
        return {
            name: bootstrap.interval(getattr(value, name), [getattr(sample, name) for sample in samples])
            for name in ("parameters", "tokens", "loss")
        }

    def undetermined(self) -> list[str]:
        """The constants that reach the end of the search range, or whose intervals do: these runs do not determine them."""
        if self.law is None:
            return []
        low, high = parametric.EXPONENTS
        ends = {"E": (1e-3, math.inf), "alpha": (low * 1.01, high * 0.99), "beta": (low * 1.01, high * 0.99)}
        found = {name: self.constant(name) for name in ends}
        # A law of few runs has no interval: NaN, which is neither below nor above.
        return [name for name, (least, most) in ends.items() if any(y < least or y > most for y in found[name])]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``fits`` and ``budgets`` by way of counting, ``fits`` also by architecture; ``diverged`` and ``unfinished`` name the
    runs left out, since a fit to those that went well is a fit to these alone."""

    fits: dict[str, dict[str, ArchitectureFit]]
    budgets: dict[str, list[float]]
    baseline: str
    diverged: list[str]
    unfinished: list[str]

    def multiplier(self, counts: str, architecture: str, flops: float) -> Interval | None:
        """How many times ``flops`` the baseline needs for this architecture's loss; None unless both laws exist."""
        ours, theirs = self.fits[counts][architecture], self.fits[counts][self.baseline]
        if ours.law is None or theirs.law is None:
            return None

        def ratio(law: Law, other: Law) -> float:
            return optimum.compute_multiplier(law, ours.cost, other, theirs.cost, flops)

        both = ours.law.replicates and theirs.law.replicates  # empty where there are too few runs
        pairs = zip(ours.law.replicates, theirs.law.replicates, strict=True) if both else ()
        return bootstrap.interval(ratio(ours.law.best, theirs.law.best), [ratio(*pair) for pair in pairs])


def compare(
    points: Sequence[Point],
    *,
    baseline: str | None = None,
    replicates: int = bootstrap.REPLICATES,
    seed: int = 0,
    unfinished: Sequence[str] = (),
) -> Comparison:
    """Fits every architecture among the ``points`` that have not diverged. ``baseline`` defaults to the first one;
    ``unfinished`` is only passed on.

    Raises:
      UserError: there is no such baseline, or nothing to fit.
    """
    diverged, all_names = [point.name for point in points if point.diverged], {point.architecture for point in points}
    points = [point for point in points if not point.diverged]
    names = list(dict.fromkeys(point.architecture for point in points))
    if not names:
        raise UserError("there are no runs to compare" + " whose loss is finite" * bool(diverged))
    baseline = baseline or names[0]
    if baseline in all_names.difference(names):
        raise UserError(f"no run of the baseline {baseline!r} has a finite loss; the others are {', '.join(names)}")
    if baseline not in names:
        raise UserError(f"there is no architecture {baseline!r} in the sweep; the architectures are {', '.join(names)}")
    fits: dict[str, dict[str, ArchitectureFit]] = {}
    budgets: dict[str, list[float]] = {}
    for counts in COUNTS:
        fits[counts] = {
            # Different seeds, so that the resamplings of two architectures are independent.
            name: _fit([point for point in points if point.architecture == name], counts, replicates, seed + i)
            for i, name in enumerate(names)
        }
        budgets[counts] = _budgets(points, counts)
    return Comparison(fits, budgets, baseline, diverged, list(unfinished))


def _fit(points: list[Point], counts: str, replicates: int, seed: int) -> ArchitectureFit:
    sizes = [point.size(counts) for point in points]
    cost = Cost.of(sizes, [point.token_flops(counts) for point in points])
    refusals: list[str] = []
    law = profile = None
    try:
        cost.check_grows()
        law = bootstrap.fit_law(
            sizes, [p.tokens for p in points], [p.loss for p in points], replicates=replicates, seed=seed
        )
    except UserError as error:
        refusals.append(str(error))
    ladder = [point for point in points if point.budget is not None and point.budget_counts == counts]
    if ladder:
        try:
            profile = isoflop.fit(
                [point.budget for point in ladder if point.budget is not None],
                [point.size(counts) for point in ladder],
                [point.loss for point in ladder],
                replicates=replicates,
                seed=seed,
            )
        except UserError as error:
            refusals.append(str(error))
    return ArchitectureFit(points, cost, law, profile, refusals)


def _budgets(points: Sequence[Point], counts: str) -> list[float]:
    """The budgets of the ladder or, without one, the lowest, middle and highest FLOPs of a run; and one beyond."""
    planned = sorted({point.budget for point in points if point.budget is not None and point.budget_counts == counts})
    spent = [point.flops(counts) for point in points]
    found = planned or [min(spent), math.sqrt(min(spent)) * math.sqrt(max(spent)), max(spent)]
    return [*found, BEYOND * found[-1]]


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that was fitted, for ``scaling.json``. Intervals are [value, low, high]; null means unknown."""
    report: dict[str, Any] = {
        "level": bootstrap.LEVEL,
        "baseline": comparison.baseline,
        "diverged": comparison.diverged,
        "unfinished": comparison.unfinished,
        "counts": {},
    }
    for counts, fits in comparison.fits.items():
        of_counts = report["counts"][COUNTS[counts]] = {}
        for name, fit in fits.items():
            of_counts[name] = {
                "runs": [
                    {
                        "name": p.name,
                        "parameters": p.size(counts),
                        "tokens": p.tokens,
                        "flops": p.flops(counts),
                        "loss": p.loss,
                    }
                    for p in fit.points
                ],
                "cost": dataclasses.asdict(fit.cost),
                "law": _law(fit),
                "isoflop": _profile(fit),
                "optimum": [_optimum(comparison, counts, name, flops) for flops in comparison.budgets[counts]],
                "not_determined": fit.undetermined(),
                "refusals": fit.refusals,
            }
    return report


def _law(fit: ArchitectureFit) -> dict[str, Any] | None:
    if fit.law is None:
        return None
    constants = {field.name: _finite(fit.constant(field.name)) for field in dataclasses.fields(Law)}
    of_n, of_d = fit.exponents()
    return constants | {"parameters_exponent": _finite(of_n), "tokens_exponent": _finite(of_d)}


def _profile(fit: ArchitectureFit) -> dict[str, Any] | None:
    if fit.profile is None:
        return None
    minima = []
    for parabolas in zip(
        fit.profile.best.parabolas, *(found.parabolas for found in fit.profile.replicates), strict=True
    ):
        size, *sizes = (parabola.best for parabola in parabolas)
        loss, *losses = (parabola.at for parabola in parabolas)
        minima.append(
            {
                "flops": parabolas[0].flops,
                "parameters": _finite(bootstrap.interval(size, sizes)),
                "loss": _finite(bootstrap.interval(loss, losses)),
                "inside": parabolas[0].inside,
            }
        )
    return {"parameters_exponent": _finite(fit.profile.interval(operator.attrgetter("power"))), "minima": minima}


def _optimum(comparison: Comparison, counts: str, name: str, flops: float) -> dict[str, Any]:
    fit = comparison.fits[counts][name]
    found = {} if fit.law is None else {key: _finite(value) for key, value in fit.optimum(flops).items()}
    multiplier = comparison.multiplier(counts, name, flops)
    return {"flops": flops, **found, "baseline_flops_multiplier": multiplier and _finite(multiplier)}


def _finite(interval: Interval) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in interval]
