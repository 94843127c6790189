"""Trains a model: python launch/train.py --config=configs/NAME.py --workdir=DIR [--config.section.key=VALUE ...]"""

from absl import flags
from ml_collections import config_flags

from jaxlinear import cli

_CONFIG = config_flags.DEFINE_config_file("config", help_string="What to train: a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lies. One that is there already goes on.", required=True)
flags.mark_flag_as_required("config")


def main() -> int:
    from jaxlinear.training.loop import train

    return train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
