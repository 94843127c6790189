"""The output of ``launch/scaling.py``: the fits as JSON, the figures as PNG and SVG, and all of it on one HTML page."""

import json
import math
import os
from pathlib import Path

from jaxlinear.evaluation import html
from jaxlinear.evaluation.plots import to_svg
from jaxlinear.sweeps.laws import bootstrap, plots
from jaxlinear.sweeps.laws.bootstrap import Interval
from jaxlinear.sweeps.laws.comparison import ArchitectureFit, Comparison, to_json
from jaxlinear.sweeps.laws.points import COUNTS

Rows = tuple[list[str], list[list[str]]]


def write(comparison: Comparison, output: str | os.PathLike, *, title: str) -> list[Path]:
    """Writes ``scaling.json``, each figure, and ``scaling.html`` into a directory; returns their paths."""
    directory = Path(output)
    drawn = plots.figures(comparison)
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "scaling.json"]
    written[0].write_text(json.dumps(to_json(comparison), indent=2) + "\n", encoding="utf-8")
    parts = [html.paragraph(_INTRODUCTION)]
    for name, (figure, caption) in drawn.items():
        svg = to_svg(figure)
        parts.append(html.figure(svg, caption, name=name))
        written += [directory / f"{name}.svg", directory / f"{name}.png"]
        written[-2].write_text(svg, encoding="utf-8")
        figure.savefig(written[-1], dpi=150)
    for counts in COUNTS:
        parts += [
            html.heading(f"Counted {COUNTS[counts]}"),
            html.table(*laws(comparison, counts)),
            *_notes(comparison, counts),
        ]
        for flops in comparison.budgets[counts]:
            parts += [
                html.paragraph(f"The best use of {flops:.3g} FLOPs:"),
                html.table(*best(comparison, counts, flops)),
            ]
    parts += [html.heading("Runs"), html.table(*_runs(comparison)), *map(html.paragraph, _left_out(comparison))]
    written.append(directory / "scaling.html")
    written[-1].write_text(html.page(title, *parts), encoding="utf-8")
    return written


def text(comparison: Comparison) -> str:
    """The laws, and their results for each budget, for a terminal."""
    parts = []
    for counts in COUNTS:
        parts.append(f"counted {COUNTS[counts]}\n\n{_aligned(laws(comparison, counts))}")
        for flops in comparison.budgets[counts]:
            parts.append(f"the best use of {flops:.3g} FLOPs\n{_aligned(best(comparison, counts, flops))}")
        parts += _remarks(comparison, counts)
    return "\n\n".join([*parts, *_left_out(comparison)])


def laws(comparison: Comparison, counts: str) -> Rows:
    """The constants of each architecture's law, and the exponents of the optimum by the law and by isoFLOP profiles."""
    head = ["architecture", "runs", "E", "alpha", "beta", "N exponent", "D exponent", "N exponent (isoFLOP)"]
    rows = []
    for name, fit in comparison.fits[counts].items():
        row = [name, str(len(fit.points))]
        if fit.law is None:
            row += [""] * 5
        else:
            row += [_text(fit.constant(key)) for key in ("E", "alpha", "beta")] + [
                _text(found) for found in fit.exponents()
            ]
        row.append("" if fit.profile is None else _text(fit.profile.interval(lambda profile: profile.power)))
        rows.append(row)
    return head, rows


def best(comparison: Comparison, counts: str, flops: float) -> Rows:
    """The optimum of each architecture for a budget, and how much more the baseline needs to reach its loss."""
    head = ["architecture", "parameters", "tokens", "loss", f"FLOPs of {comparison.baseline} for it"]
    rows = []
    for name, fit in comparison.fits[counts].items():
        if fit.law is None:
            rows.append([name, "", "", "", ""])
            continue
        found = fit.optimum(flops)
        multiplier = comparison.multiplier(counts, name, flops)
        times = "" if multiplier is None or name == comparison.baseline else "x " + _text(multiplier)
        rows.append([name, *(_text(found[key]) for key in ("parameters", "tokens", "loss")), times])
    return head, rows


_INTRODUCTION = (
    f"Square brackets hold {100 * bootstrap.LEVEL:.0f}% intervals, from fits to resampled runs; for isoFLOP profiles, to "
    "resampled residuals. Losses are held-out, in nats per token, at the end of each run, all of the same text; FLOPs are "
    "those of forward and backward passes, by a formula for each layer. Of runs with the same architecture, size and "
    "tokens the best one counts. Beyond the largest budget the laws are extrapolated."
)


def _remarks(comparison: Comparison, counts: str) -> list[str]:
    """What the tables do not say by themselves."""
    found = []
    for name, fit in comparison.fits[counts].items():
        found += [f"{name}: {reason}" for reason in fit.refusals]
        if fit.law is not None and not fit.law.replicates:
            found.append(
                f"{name}: {len(fit.points)} runs are too few for intervals; {bootstrap.FEWEST} or more give them"
            )
        if undetermined := fit.undetermined():
            found.append(
                f"{name}: these runs do not determine {', '.join(undetermined)}; the interval reaches the end of the "
                "range searched, and the law says little beyond the runs"
            )
        found += _outside(name, fit)
    return found


def _left_out(comparison: Comparison) -> list[str]:
    reasons = {"their loss is not finite": comparison.diverged, "they are not finished": comparison.unfinished}
    return [f"left out because {reason}: {', '.join(names)}" for reason, names in reasons.items() if names]


def _outside(name: str, fit: ArchitectureFit) -> list[str]:
    parabolas = [] if fit.profile is None else fit.profile.best.parabolas
    flops = [f"{parabola.flops:.3g}" for parabola in parabolas if not parabola.inside]
    return [f"{name}: the best size lies outside the sizes tried at {', '.join(flops)} FLOPs"] if flops else []


def _notes(comparison: Comparison, counts: str) -> list[str]:
    return [html.paragraph(remark) for remark in _remarks(comparison, counts)]


def _runs(comparison: Comparison) -> Rows:
    head = ["run", "parameters", "of these embedding", "tokens", "FLOPs", "without logits", "loss"]
    rows = [
        [
            point.name,
            f"{point.parameters:,}",
            f"{point.embedding_parameters:,}",
            f"{point.tokens:,}",
            f"{point.flops('with'):.3g}",
            f"{point.flops('without'):.3g}",
            f"{point.loss:.4f}",
        ]
        for fit in comparison.fits["with"].values()
        for point in fit.points
    ]
    return head, rows


def _text(interval: Interval) -> str:
    value, low, high = (_number(number) for number in interval)
    return value if low == high == "?" else f"{value} [{low}, {high}]"


def _number(value: float) -> str:
    if math.isnan(value):
        return "?"
    if math.isinf(value):
        return "∞"
    rounded = float(f"{value:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= size:
            return f"{rounded / size:.3g}{unit}" if rounded < 1e15 else f"{value:.2g}"
    return f"{value:.3g}"


def _aligned(rows: Rows) -> str:
    lines = [rows[0], *rows[1]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
