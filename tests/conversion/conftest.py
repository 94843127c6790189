"""Runs and their exports."""

import functools
import shutil

import pytest

from jaxlinear.conversion import export_weights
from tests.conversion.converted import MODELS, layout, run


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """``made(name)``: a run of that model and its export, made once; do not change either."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        run(folder / "run", **MODELS[name])
        export_weights(folder / "run", folder / "exported", layout=layout(name))
        return folder / "run", folder / "exported"

    return make


@pytest.fixture
def copied(made, tmp_path):
    """``copied(name)``: a copy of the export."""
    return lambda name: shutil.copytree(made(name)[1], tmp_path / "source")
