"""Plots of runs. Needs the extra ``plot``."""

import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlinear.errors import UserError
from jaxlinear.training import metrics
from jaxlinear.training.workdir import heldout_changes, read_config, read_starts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_FEW = 5  # runs whose names have room among their curves


def loss_curves(workdirs: Sequence[str | os.PathLike]) -> "Figure":
    """Training loss (each logged step, and smoothed) and held-out loss of runs, plotted against tokens. The line of the
    latter is broken where the text changes. The names of many runs are beside the curves, once each."""
    few = len(workdirs) <= _FEW
    figure = make_figure(7, 4) if few else make_figure(10, max(4, 0.7 + 0.22 * len(workdirs)))
    axes, colours = figure.subplots(), _colours(len(workdirs))
    for i, (workdir, name) in enumerate(zip(workdirs, _names(workdirs), strict=True)):
        lines = metrics.read(workdir)
        training = [line for line in lines if "loss" in line]
        if not training:
            read_config(workdir)  # refuses what is not the work directory of a run
            raise UserError(f"{workdir} has logged no losses yet")
        # Evaluations are at steps of their own; every step of a run has the same number of tokens.
        tokens_a_step = training[-1]["tokens"] / training[-1]["step"]
        heldout = [line for line in lines if "heldout_loss" in line]
        losses = [line["loss"] for line in training]
        seen = [line["tokens"] for line in training]
        axes.plot(seen, losses, color=colours[i], alpha=0.25, linewidth=0.8)
        training_name, heldout_name = (f"{name}, training", plain(f"{name}, held out")) if few else (name, "_")
        axes.plot(seen, _smooth(losses), _mark(losses), color=colours[i], label=_label(training_name, losses))
        for j, part in enumerate(_parts(heldout, heldout_changes(read_starts(workdir)))):
            axes.plot(
                [line["step"] * tokens_a_step for line in part],
                [line["heldout_loss"] for line in part],
                color=colours[i],
                marker="o",
                linestyle="--",
                label="_" if j else heldout_name,  # one in the legend
            )
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if few:
        axes.legend()
    else:
        figure.legend(loc="outside right upper", title="training (dashed: held out)")
    return figure


def _colours(count: int) -> list[Any]:
    """One for each run: Matplotlib's own cycle has ten."""
    from matplotlib import colormaps

    if count <= 10:
        return [f"C{i}" for i in range(count)]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _mark(values: Sequence[float]) -> str:
    """Format of a curve: a line alone would not show a single number."""
    return "-" if sum(map(math.isfinite, values)) > 1 else "-o"


def _names(workdirs: Sequence[str | os.PathLike]) -> list[str]:
    """The last part of each path, or as many parts as make them unique."""
    paths = [Path(workdir).resolve().parts for workdir in workdirs]
    count = 1
    while len({path[-count:] for path in paths}) < len(set(paths)):
        count += 1
    return ["/".join(path[-count:]) for path in paths]


def plain(name: str) -> str:
    """A label that Matplotlib shows as it is: it would leave one that begins with an underscore out of legends, and set
    what is between dollar signs as a formula."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _label(name: str, values: Sequence[float]) -> str:
    """A curve's label. It says that there is nothing to see of a run that diverged before its first logged step."""
    return plain(name) + ("" if any(map(math.isfinite, values)) else ", none is finite")


def _parts(lines: Sequence[dict[str, Any]], ends: Sequence[int]) -> list[list[dict[str, Any]]]:
    """The lines, divided after each of these steps; no empty parts."""
    bounds = [-1, *ends, math.inf]
    parts = [[line for line in lines if low < line["step"] <= high] for low, high in itertools.pairwise(bounds)]
    return [part for part in parts if part]


def _smooth(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """A running mean without the bias of its start. It skips values that are not finite, such as the loss of a skipped
    step: otherwise all later ones would not be finite either."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def step_curves(curves: Mapping[str, Mapping[int, float]], what: str, *, marker: str = "o") -> "Figure":
    """Numbers of a run over its steps: ``{name: {step: value}}``."""
    figure = make_figure(7, 4)
    axes = figure.subplots()
    for name, values in curves.items():
        one = "o" if _mark(list(values.values())) == "-o" else marker
        axes.plot(
            list(values), list(values.values()), marker=one, markersize=3, label=_label(name, list(values.values()))
        )
    axes.set_xlabel("steps")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def make_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size, in inches. ``UserError`` if Matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'jaxlinear[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: "Figure") -> str:
    """The figure as an SVG document; equal figures give equal text."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "jaxlinear", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
