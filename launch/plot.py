"""Draws the loss curves of runs: python launch/plot.py --workdir=RUN [--workdir=RUN ...] --output=loss.png"""

import pathlib

from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_WORKDIRS = flags.DEFINE_multi_string("workdir", None, "Directory of a run; several are drawn together.", required=True)
_OUTPUT = flags.DEFINE_string("output", "loss.png", "Image file: .png, .svg or .pdf.")


def main() -> None:
    suffix = pathlib.Path(_OUTPUT.value).suffix
    if suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--output={_OUTPUT.value} must end in .png, .svg or .pdf")
    cli.check_output("output", _OUTPUT.value)
    from jaxlinear.evaluation import plots

    plots.loss_curves(_WORKDIRS.value).savefig(_OUTPUT.value, dpi=150)


if __name__ == "__main__":
    cli.run(main)
