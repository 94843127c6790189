"""Compiled programs are kept between the runs of these tests, in this process and in those that they start."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.training import tiny


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """The directory of JAX's compilation cache, new for each session."""
    return tmp_path_factory.mktemp("compiled_programs")


@pytest.fixture(autouse=True, scope="module")
def _keep_compiled_programs(compiled_programs):
    wanted = {
        "jax_compilation_cache_dir": str(compiled_programs),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    _set(wanted)
    yield
    _set(before)


def _set(options):
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def run_config(tiny_config):
    """A config whose run can be made longer without becoming another: 8 steps, a checkpoint every second one."""
    return tiny.lasting(tiny_config)


@pytest.fixture(scope="module")
def whole_run(tiny_config, tmp_path_factory):
    """The directory of the run of ``run_config`` from its first to its 8th step, never interrupted."""
    from jaxlinear.training.loop import FINISHED, train

    workdir = tmp_path_factory.mktemp("whole_run") / "run"
    assert train(tiny.lasting(tiny_config), workdir) == FINISHED
    return workdir


@pytest.fixture(scope="session")
def launch(tiny_dataset, compiled_programs):
    """``launch(workdir, *arguments)`` starts launch/train.py on one device as a process of its own."""

    def start(workdir, *arguments):
        return tiny.start(workdir, tiny_dataset, compiled_programs, *arguments)

    return start


@pytest.fixture(scope="session")
def uninterrupted(launch, tmp_path_factory):
    """The directory of the run of ``tiny.ARGUMENTS``, from its first to its last step on one device."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = launch(workdir)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert list(tiny.losses(workdir)) == list(range(1, tiny.ARGUMENTS["config.training.steps"] + 1))
    return workdir
