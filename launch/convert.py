"""Imports the weights of another program's model, or exports those of a run. docs/conversion.md lists the formats.

python launch/convert.py --source=PATH --workdir=DIR
python launch/convert.py --workdir=DIR --target=PATH [--step=N] [--layout=flax]
"""

from absl import flags

from jaxlinear import cli
from jaxlinear.errors import UserError

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run that --source is imported into or --target exported from.", required=True
)
_SOURCE = flags.DEFINE_string("source", None, "Import this Hugging Face directory or Flax checkpoint.")
_TARGET = flags.DEFINE_string("target", None, "Export the run to this directory.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint to export; the newest by default.")
_LAYOUT = flags.DEFINE_string("layout", "huggingface", "Format of the export: huggingface, or flax (RecurrentGemma).")


def main() -> None:
    cli.leave_out_warnings_of_orbax()
    from jaxlinear import conversion

    if (_SOURCE.value is None) == (_TARGET.value is None):
        raise UserError("give --source to import into --workdir, or --target to export from it")
    if _SOURCE.value is not None:
        if _STEP.value is not None or _LAYOUT.present:
            raise UserError(
                "--step and --layout are for an export; the format of an import is recognised from --source"
            )
        conversion.import_weights(_SOURCE.value, _WORKDIR.value)
        print(f"imported {_SOURCE.value} into {_WORKDIR.value}")
    else:
        cli.check_path("target", _TARGET.value)
        conversion.export_weights(_WORKDIR.value, _TARGET.value, step=_STEP.value, layout=_LAYOUT.value)
        print(f"exported {_WORKDIR.value} to {_TARGET.value}")


if __name__ == "__main__":
    cli.run(main)
