"""Fixtures of the training tests: a config whose run can be made longer, and runs that nothing interrupted."""

import pytest

from tests.training import tiny


@pytest.fixture
def run_config(tiny_config):
    """A config whose run can be made longer without becoming another: 8 steps, a checkpoint every second one."""
    return tiny.lasting(tiny_config)


@pytest.fixture(scope="module")
def whole_run(tiny_config, tmp_path_factory):
    """The directory of ``run_config``'s run from its first to its 8th step, never interrupted."""
    from jaxlinear.training.loop import FINISHED, train

    workdir = tmp_path_factory.mktemp("whole_run") / "run"
    assert train(tiny.lasting(tiny_config), workdir) == FINISHED
    return workdir


@pytest.fixture(scope="session")
def launch(tiny_dataset):
    """``launch(workdir, *arguments)`` starts launch/train.py on one device in its own process, which may first run the
    Python code ``before``."""
    return lambda workdir, *arguments, before="": tiny.start(workdir, tiny_dataset, *arguments, before=before)


@pytest.fixture(scope="session")
def uninterrupted(launch, tmp_path_factory):
    """The directory of the run of ``tiny.ARGUMENTS`` from its first to its last step, on one device."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = launch(workdir)
    _, errors = process.communicate(timeout=tiny.PATIENCE)
    assert process.returncode == 0, errors
    assert list(tiny.losses(workdir)) == list(range(1, tiny.ARGUMENTS["config.training.steps"] + 1))
    return workdir
