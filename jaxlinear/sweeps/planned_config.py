"""The config of a planned run: launch/train.py --config=jaxlinear/sweeps/planned_config.py:jobs/NAME/config.json"""

import pathlib

from jaxlinear import config as configs


def get_config(path: str):
    """The config in the file ``path``, which is the part of ``--config`` after the colon."""
    return configs.from_json(pathlib.Path(path).read_text(encoding="utf-8"))
