"""What the pictures of runs show."""

import json

from jaxlinear.evaluation import plots
from jaxlinear.training import metrics


def test_every_evaluation_is_in_the_loss_curves(tmp_path):
    """Also of steps that were not logged."""
    lines = [{"step": step, "loss": 3 - step / 100, "tokens": 512 * step} for step in (20, 40, 60)]
    lines += [{"step": step, "heldout_loss": 3.1 - step / 100} for step in (15, 30, 45, 60)]
    text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"]))
    (tmp_path / metrics.FILE).write_text(text)
    (axes,) = plots.loss_curves([tmp_path]).axes
    found = {line.get_label(): line for line in axes.lines}
    heldout, training = (found[f"{tmp_path.name}, {what}"] for what in ("held out", "training"))
    assert list(heldout.get_xdata()) == [512 * step for step in (15, 30, 45, 60)]
    assert list(training.get_xdata()) == [512 * step for step in (20, 40, 60)]
