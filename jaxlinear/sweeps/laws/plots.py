"""Matplotlib figures of a comparison. Needs the extra ``plot``."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlinear.evaluation.plots import make_figure, plain
from jaxlinear.sweeps.laws.comparison import Comparison
from jaxlinear.sweeps.laws.points import COUNTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(comparison: Comparison) -> dict[str, tuple["Figure", str]]:
    """Each figure and its caption, by name; only those for which there is a fit."""
    drawn = {"loss": (_loss(comparison), _LOSS)}
    if any(fit.law is not None for fits in comparison.fits.values() for fit in fits.values()):
        drawn["optimum"] = (_optimum(comparison), _OPTIMUM)
        drawn["residuals"] = (_residuals(comparison), _RESIDUALS)
    ladders = [
        counts for counts, fits in comparison.fits.items() if any(fit.profile is not None for fit in fits.values())
    ]
    for counts in ladders:
        name = "isoflop" if len(ladders) == 1 else f"isoflop_{counts}"
        drawn[name] = (_isoflop(comparison, counts), _ISOFLOP.format(counts=COUNTS[counts]))
    return drawn


_LOSS = (
    "Held-out loss of every run over its FLOPs. Lines: the loss of the best use of the FLOPs under each architecture's "
    "law, with its 95% interval; dashed where no run was."
)
_OPTIMUM = "The best number of parameters for a budget, under each architecture's law, with its 95% interval."
_RESIDUALS = "What the laws say against what was measured."
_ISOFLOP = (
    "IsoFLOP profiles ({counts}): the runs of one budget are one colour, the parabola is fitted to them, the diamond is "
    "its minimum where that lies among the sizes."
)


def _loss(comparison: Comparison) -> "Figure":
    def draw(axes: Any, counts: str, name: str, colour: str) -> None:
        fit = comparison.fits[counts][name]
        spent = [point.flops(counts) for point in fit.points]
        axes.scatter(spent, [point.loss for point in fit.points], color=colour, s=14, label=plain(name))
        if fit.law is not None:
            _band(axes, colour, min(spent), max(spent), lambda flops: fit.optimum(flops)["loss"])

    return _panels(comparison, draw, ylabel="held-out loss (nats per token)")


def _optimum(comparison: Comparison) -> "Figure":
    def draw(axes: Any, counts: str, name: str, colour: str) -> None:
        fit = comparison.fits[counts][name]
        if fit.law is None:
            return
        spent = [point.flops(counts) for point in fit.points]
        _band(axes, colour, min(spent), max(spent), lambda flops: fit.optimum(flops)["parameters"], label=plain(name))
        if fit.profile is not None:
            inside = [parabola for parabola in fit.profile.best.parabolas if parabola.inside]
            axes.scatter([p.flops for p in inside], [p.best for p in inside], color=colour, marker="D", s=22)
        axes.set_yscale("log")

    return _panels(comparison, draw, ylabel="parameters")


def _residuals(comparison: Comparison) -> "Figure":
    figure, axes = _figure(1, len(COUNTS))
    for counts, panel in zip(COUNTS, axes.flat, strict=True):
        for i, (name, fit) in enumerate(comparison.fits[counts].items()):
            if fit.law is None:
                continue
            measured = np.array([point.loss for point in fit.points])
            said = fit.law.best.loss(
                [point.size(counts) for point in fit.points], [point.tokens for point in fit.points]
            )
            panel.scatter(measured, 100 * (measured / said - 1), color=f"C{i}", s=14, label=plain(name))
        panel.axhline(0, color="0.5", linewidth=0.8)
        panel.set_xlabel("held-out loss (nats per token)")
        panel.set_ylabel("measured over the law (%)")
        panel.set_title(COUNTS[counts])
        panel.grid(alpha=0.3)
    axes.flat[0].legend()
    return figure


def _isoflop(comparison: Comparison, counts: str) -> "Figure":
    fits = {name: fit for name, fit in comparison.fits[counts].items() if fit.profile is not None}
    figure, axes = _figure(math.ceil(len(fits) / 2), min(len(fits), 2))
    for panel, (name, fit) in zip(axes.flat, fits.items(), strict=False):
        assert fit.profile is not None
        for i, parabola in enumerate(fit.profile.best.parabolas):
            runs = [point for point in fit.points if (point.budget, point.budget_counts) == (parabola.flops, counts)]
            sizes = np.array([point.size(counts) for point in runs])
            panel.scatter(
                sizes, [point.loss for point in runs], color=f"C{i}", s=14, label=f"{parabola.flops:.2g} FLOPs"
            )
            between = np.geomspace(sizes.min(), sizes.max(), 50)
            panel.plot(between, parabola.loss(between), color=f"C{i}", linewidth=1)
            if parabola.inside:
                panel.scatter([parabola.best], [parabola.at], color=f"C{i}", marker="D", s=30)
        panel.set_xscale("log")
        panel.set_title(plain(name))
        panel.set_xlabel("parameters")
        panel.set_ylabel("held-out loss (nats per token)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    for panel in axes.flat[len(fits) :]:
        panel.set_visible(False)
    return figure


def _panels(comparison: Comparison, draw: Callable[[Any, str, str, str], None], *, ylabel: str) -> "Figure":
    """A panel for each way of counting, with FLOPs on the horizontal axis. ``draw`` adds an architecture."""
    figure, axes = _figure(1, len(COUNTS))
    for counts, panel in zip(COUNTS, axes.flat, strict=True):
        for i, name in enumerate(comparison.fits[counts]):
            draw(panel, counts, name, f"C{i}")
        panel.set_xscale("log")
        panel.set_xlabel("training FLOPs")
        panel.set_ylabel(ylabel)
        panel.set_title(COUNTS[counts])
        panel.grid(alpha=0.3)
    axes.flat[0].legend()
    return figure


def _band(
    axes: Any, colour: str, low: float, high: float, interval: Callable[[float], Any], label: str | None = None
) -> None:
    """A curve over FLOPs with its interval, dashed outside the range of the runs."""
    for flops, style, name in (
        (np.geomspace(low, high, 40), "-", label),
        (np.geomspace(high, 10 * high, 15), "--", None),
    ):
        value, bottom, top = np.array([interval(float(count)) for count in flops]).T
        axes.plot(flops, value, color=colour, linestyle=style, linewidth=1.2, label=name)
        axes.fill_between(flops, bottom, top, color=colour, alpha=0.12, linewidth=0)


def _figure(rows: int, columns: int) -> tuple["Figure", Any]:
    figure = make_figure(5 * columns, 3.8 * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)
