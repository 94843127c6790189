"""What the plots of runs show."""

import json
import math

import pytest

from jaxlinear import config as configs
from jaxlinear.errors import UserError
from jaxlinear.evaluation import plots
from jaxlinear.training import metrics


def write(directory, lines=None):
    directory.mkdir(parents=True, exist_ok=True)
    if lines is None:
        lines = [{"step": step, "loss": 3 - step / 100, "tokens": 512 * step} for step in (20, 40, 60)]
        lines += [{"step": step, "heldout_loss": 3.1 - step / 100} for step in (15, 30, 45, 60)]
    text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
    (directory / metrics.FILE).write_text(text)
    return directory


def drawn(*workdirs):
    (axes,) = plots.loss_curves(workdirs).axes
    return axes


def training(losses):
    return [{"step": step, "loss": loss, "tokens": 512 * step} for step, loss in enumerate(losses, 1)]


def test_every_evaluation_is_in_the_loss_curves(tmp_path):
    """Also those of steps that were not logged."""
    found = {line.get_label(): list(line.get_xdata()) for line in drawn(write(tmp_path)).lines}
    assert found[f"{tmp_path.name}, held out"] == [512 * step for step in (15, 30, 45, 60)]
    assert found[f"{tmp_path.name}, training"] == [512 * step for step in (20, 40, 60)]


def test_a_run_without_losses_is_told_from_what_is_no_run(tmp_path, tiny_config):
    with pytest.raises(UserError, match="is not the work directory of a run"):
        plots.loss_curves([tmp_path])
    (tmp_path / "config.json").write_text(configs.to_json(tiny_config), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{tmp_path} has logged no losses yet$"):
        plots.loss_curves([tmp_path])


def test_a_loss_that_is_not_finite_is_a_gap_in_the_curve(tmp_path):
    """It does not end the smoothed curve: a run that skips such a step goes on."""
    axes = drawn(write(tmp_path, training([math.nan, 4.0, 3.0, math.inf, math.nan, 2.0])))
    smoothed = next(line for line in axes.lines if line.get_label().endswith("training")).get_ydata()
    assert math.isnan(smoothed[0])
    mean = (0.8 * 4 + 3) / 1.8
    expected = [4, mean, mean, mean, (0.64 * 4 + 0.8 * 3 + 2) / (0.64 + 0.8 + 1)]
    assert list(smoothed[1:]) == pytest.approx(expected)


def test_a_curve_without_a_finite_number_says_so(tmp_path):
    """An empty figure would look like a fault of the plot."""
    axes = drawn(write(tmp_path, training([math.nan, math.nan])))
    assert [line.get_label() for line in axes.lines][-1] == f"{tmp_path.name}, training, none is finite"
    (axes,) = plots.step_curves({"loss": {1: math.nan, 2: math.inf}, "z-loss": {1: 1.0}}, "loss").axes
    assert [line.get_label() for line in axes.lines] == ["loss, none is finite", "z-loss"]


@pytest.mark.parametrize("name", ["_hidden", "a$^$b", "cost$1$2"])
def test_names_are_shown_as_they_are(tmp_path, name):
    """Matplotlib leaves labels with an underscore in front out of legends, and sets text between dollar signs."""
    figure = plots.loss_curves([write(tmp_path / name)])
    shown = plots.to_svg(figure)
    assert f"{name}, training</text>" in shown and f"{name}, held out</text>" in shown


def test_the_held_out_line_is_broken_where_its_text_changes(tmp_path):
    starts = [{"step": 0, "heldout_text": "a"}, {"step": 30, "heldout_text": "b"}]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    axes = drawn(write(tmp_path))
    heldout = [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"]
    assert heldout == [[512 * 15, 512 * 30], [512 * 45, 512 * 60]]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [f"{tmp_path.name}, training", f"{tmp_path.name}, held out"]


def test_runs_are_told_apart(tmp_path, monkeypatch):
    """They are labelled by the parts in which their paths differ."""

    def labels(*workdirs):
        return [line.get_label() for line in drawn(*workdirs).lines if line.get_label().endswith("training")]

    first, second, other = (write(tmp_path / path) for path in ("a/run", "b/run", "b/other"))
    assert labels(first, other) == ["run, training", "other, training"]
    assert labels(first, second, other) == ["a/run, training", "b/run, training", "b/other, training"]
    assert labels(first, first) == ["run, training"] * 2
    monkeypatch.chdir(first)
    assert labels(".") == ["run, training"]


def test_many_runs_have_a_colour_and_a_name_each_beside_the_curves(tmp_path):
    figure = plots.loss_curves([write(tmp_path / f"run{n}") for n in range(12)])
    (axes,) = figure.axes
    colours = {line.get_color() for line in axes.lines if line.get_linestyle() == "--"}
    assert len(colours) == 12
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"run{n}" for n in range(12)]
    figure.draw_without_rendering()  # lays it out
    assert axes.get_window_extent().x1 < legend.get_window_extent().x0
    assert axes.get_window_extent().width > 0.6 * figure.get_window_extent().width


def test_a_single_loss_is_a_mark(tmp_path):
    assert [line.get_marker() for line in drawn(write(tmp_path, training([4.0]))).lines] == ["None", "o"]
    (axes,) = plots.step_curves({"loss": {1: 4.0}, "both": {1: 4.0, 2: 3.0}}, "nats", marker="").axes
    assert [line.get_marker() for line in axes.lines] == ["o", ""]
