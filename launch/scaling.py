"""Fits scaling laws to a finished sweep: python launch/scaling.py --workdir=DIR. docs/scaling.md explains it."""

import os

from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the report; by default scaling/ in the sweep's directory.")
_BASELINE = flags.DEFINE_string("baseline", None, "Architecture that others are compared with; by default the first.")
_PARTIAL = flags.DEFINE_boolean("partial", False, "Leave out unfinished runs.")
_EVALUATED = flags.DEFINE_boolean(
    "evaluated", False, "Use the losses that launch/evaluate.py --follow found, not those that the runs logged."
)
_REPLICATES = flags.DEFINE_integer("replicates", 500, "Resamplings for the intervals.", lower_bound=20)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the resamplings.", lower_bound=0)


def main() -> None:
    if _OUTPUT.value and os.path.exists(_OUTPUT.value) and not os.path.isdir(_OUTPUT.value):
        raise UserError(
            f"--output={_OUTPUT.value} is a file, but the report has several files: name a directory, new or existing"
        )
    cli.leave_out_warnings_of_orbax()
    from jaxlinear.sweeps.laws import comparison, points, report

    measured = points.sweep_points(_WORKDIR.value, partial=_PARTIAL.value, evaluated=_EVALUATED.value)
    fitted = comparison.compare(
        measured,
        baseline=_BASELINE.value,
        replicates=_REPLICATES.value,
        seed=_SEED.value,
        unfinished=points.unfinished(_WORKDIR.value),
    )
    name = os.path.basename(os.path.abspath(_WORKDIR.value))
    output = _OUTPUT.value or os.path.join(_WORKDIR.value, "scaling")
    written = report.write(fitted, output, title=f"Scaling laws: {name}")
    print(report.text(fitted))
    print()
    print(*written, sep="\n")


if __name__ == "__main__":
    cli.run(main)
