"""Checks the fits of scaling laws against known constants: how often the intervals cover them.

    python benchmarks/scaling_laws.py [--draws=20] [--sizes=7] [--budgets=5] [--replicates=200] [--json=FILE]

It also fits the points that Hoffmann et al. 2022 (arXiv:2203.15556) published in figure 4, as Besiroglu et al. 2024
(arXiv:2404.10102) read them off it:

    python benchmarks/scaling_laws.py --draws=0 --points=analyzing-chinchilla/data/svg_extracted_data.csv

The file is in github.com/epoch-research/analyzing-chinchilla, which names no licence, so it is not in this repository.
"""

import csv
import pathlib
import time

import common
import numpy as np
from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws import bootstrap, isoflop, optimum
from jaxlinear.sweeps.laws.parametric import Law

_DRAWS = flags.DEFINE_integer("draws", 20, "Synthetic ladders, each with its own noise.")
_SIZES = flags.DEFINE_integer("sizes", 7, "Sizes at each budget.", lower_bound=3)
_BUDGETS = flags.DEFINE_integer("budgets", 5, "Budgets, from 1e17 to 1e20 FLOPs.", lower_bound=2)
_NOISE = flags.DEFINE_list("noise", ["0.003", "0.01"], "Standard deviations of the noise in log L.")
_REPLICATES = flags.DEFINE_integer("replicates", 200, "Bootstrap resamplings of each fit.")
_POINTS = flags.DEFINE_string("points", None, "The CSV of the published points.")
_OUTLIERS = flags.DEFINE_integer("outliers", 5, "Points of the highest loss to leave out, as in the replication.")
common.define_json()

# Besiroglu et al. 2024, table 1.
PUBLISHED = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
_NAMES = ("E", "alpha", "beta")


def coverage(noise: float, draws: int, sizes: int, steps: int, replicates: int) -> dict:
    """In how many of ``draws`` ladders, of so many sizes at so many budgets, each interval covers the truth."""
    budgets = np.repeat(np.geomspace(1e17, 1e20, steps), sizes)
    best = np.array([optimum.compute_optimal(PUBLISHED, budget).parameters for budget in budgets])
    parameters = best * np.tile(np.geomspace(0.25, 4, sizes), steps)
    tokens = budgets / (6 * parameters)
    covered = dict.fromkeys((*_NAMES, "isoflop power"), 0)
    for seed in range(draws):
        random = np.random.default_rng(seed)
        losses = PUBLISHED.loss(parameters, tokens) * np.exp(noise * random.standard_normal(len(tokens)))
        fit = bootstrap.fit_law(parameters, tokens, losses, replicates=replicates, seed=seed)
        profile = isoflop.fit(budgets, parameters, losses, replicates=replicates, seed=seed)
        found = {name: fit.interval(lambda law, name=name: getattr(law, name)) for name in _NAMES}
        found["isoflop power"] = profile.interval(lambda profile: profile.power)
        truth = {name: getattr(PUBLISHED, name) for name in _NAMES}
        truth["isoflop power"] = optimum.exponents(PUBLISHED)[0]
        for name, interval in found.items():
            covered[name] += interval.low <= truth[name] <= interval.high
    return {"noise": noise, "draws": draws, "covered": covered}


def published_points(path: str, outliers: int, replicates: int) -> dict:
    """The fit to the published points."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"--points={path}: there is no such file")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [
            (float(row["Model Size"]), float(row["Training FLOP"]), float(row["loss"])) for row in csv.DictReader(file)
        ]
    rows = sorted(rows, key=lambda row: row[2])[: len(rows) - outliers]
    parameters, flops, losses = map(np.array, zip(*rows, strict=True))
    fit = bootstrap.fit_law(parameters, flops / (6 * parameters), losses, replicates=replicates)
    names = ("E", "A", "B", "alpha", "beta")
    intervals = {name: fit.interval(lambda law, name=name: getattr(law, name)) for name in names}
    intervals["N exponent"] = fit.interval(lambda law: optimum.exponents(law)[0])
    return {"points": len(rows), "fit": {name: found._asdict() for name, found in intervals.items()}}


def main() -> None:
    report: dict = {"coverage": [], "published": None}
    if _DRAWS.value:
        for noise in map(float, _NOISE.value):
            begin = time.perf_counter()
            result = coverage(noise, _DRAWS.value, _SIZES.value, _BUDGETS.value, _REPLICATES.value)
            report["coverage"].append(result)
            shown = ", ".join(f"{name} {count}" for name, count in result["covered"].items())
            print(f"noise {noise:g}: of {_DRAWS.value} draws covered: {shown} ({time.perf_counter() - begin:.0f} s)")
    if _POINTS.value:
        report["published"] = published_points(_POINTS.value, _OUTLIERS.value, _REPLICATES.value)
        print(f"{report['published']['points']} published points")
        for name, found in report["published"]["fit"].items():
            theirs = f"   replication {getattr(PUBLISHED, name)}" if hasattr(PUBLISHED, name) else ""
            print(f"{name:>10} {found['value']:10.4f}  [{found['low']:.4f}, {found['high']:.4f}]{theirs}")
    common.write(report)


if __name__ == "__main__":
    cli.run(main)
