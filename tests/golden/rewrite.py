"""Writes the resolved text of every file in configs/ to its golden file: python -m tests.golden.rewrite

Run it after an intended change of a config, a default or a preset, and read the difference before committing.
"""

import importlib.util
import pathlib

from jaxlinear import config as configs

GOLDEN = pathlib.Path(__file__).parent
CONFIGS = GOLDEN.parents[1] / "configs"
COMMAND = "python -m tests.golden.rewrite"


def files() -> list[pathlib.Path]:
    """The files in configs/."""
    return sorted(CONFIGS.glob("*.py"))


def resolved_text(path: pathlib.Path) -> str:
    """What a run of this config writes to its config.json, apart from what depends on the data."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configs.to_json(configs.resolve(module.get_config()))


def rewrite() -> None:
    """Writes the golden file of every config, and removes those of configs that are gone."""
    for stale in GOLDEN.glob("*.json"):
        stale.unlink()
    for path in files():
        (GOLDEN / f"{path.stem}.json").write_text(resolved_text(path), encoding="utf-8")


if __name__ == "__main__":
    rewrite()
