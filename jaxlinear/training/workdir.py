"""A run's directory: its config, and what may change when the run goes on."""

import os
from pathlib import Path

from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear.checkpoint import DIRECTORY
from jaxlinear.errors import UserError
from jaxlinear.parallel import start

CONFIG = "config.json"

# A run goes on with other values of these; any other key would make it another run.
_MAY_CHANGE = {
    "mesh",
    "parallel",
    "checkpoint",
    "evaluation",
    "logging",
    "data.path",  # the dataset may have moved; that it is the same one is checked by its contents
    "data.heldout_path",
    "training.steps",
    "training.max_skips",
    "model.remat",
}


def read_config(workdir: str | os.PathLike) -> config_dict.ConfigDict:
    """The resolved config that a run was begun with."""
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not the work directory of a run: it has no {CONFIG}")
    try:
        return configs.from_json(path.read_text())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def prepare(workdir: str | os.PathLike, config: config_dict.ConfigDict) -> Path:
    """Makes the directory, or checks that the run in it is the one that ``config`` describes; writes the config."""
    directory = Path(workdir)
    if (directory / DIRECTORY / "0").exists():  # a run saves from step 1 on
        raise UserError(
            f"{workdir} holds imported weights, without the state of an optimiser: they can be evaluated, sampled from and "
            "exported, not trained; give the new run a --workdir of its own"
        )
    if (directory / CONFIG).exists():
        check_same_run(directory, read_config(directory), config)
    directory.mkdir(parents=True, exist_ok=True)
    if start.is_first():
        temporary = directory / (CONFIG + ".tmp")
        temporary.write_text(configs.to_json(config))
        os.replace(temporary, directory / CONFIG)
    return directory


def check_same_run(workdir: Path, old: config_dict.ConfigDict, new: config_dict.ConfigDict) -> None:
    """Raises ``UserError`` for the first key that would make the run in ``workdir`` another run."""
    for key in configs.KEYS:
        section, name = key.split(".")
        if section in _MAY_CHANGE or key in _MAY_CHANGE or old[section][name] == new[section][name]:
            continue
        kind = "a checkpoint of another model" if section == "model" else "another run"
        raise UserError(
            f"{workdir} holds {kind}: {key} is {old[section][name]!r} there and {new[section][name]!r} in this config; "
            "give the new run a --workdir of its own"
        )
