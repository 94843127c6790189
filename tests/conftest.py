"""Shared by all tests: several CPU devices, a cache of compiled programs, and a run that is trained once."""

import collections
import contextlib
import gc
import itertools
import os
import pathlib
import shutil
import tempfile

from jaxlinear import locks
from tests import forked, xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ and xla_flags.FAST not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {xla_flags.FAST}"

# Compiled programs are cached for the workers and for programs that tests start, which inherit this environment. Never in
# the user's own directory: tests kill programs while they write, and no test should depend on an earlier session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="compiled_programs_")
    _lock = open(os.path.join(_programs.name, "no_lock_yet"), "wb")
    assert locks.take(_lock)
    os.rename(_lock.name, os.path.join(_programs.name, locks.FILE))
    for _left in pathlib.Path(tempfile.gettempdir()).glob("compiled_programs_*"):  # left by tests that were killed
        with contextlib.suppress(OSError), (_left / locks.FILE).open("rb") as _other:
            if locks.take(_other):
                shutil.rmtree(_left, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import numpy as np
import pytest

from jaxlinear.costs import targets

targets.set_environment()

# Tracing creates many long-lived objects, and Python's default thresholds would collect garbage all the time.
gc.set_threshold(50_000, 20, 20)

_MAPS = pathlib.Path("/proc/self/maps")
_MANY_MAPS = 30_000  # Linux allows a process 65,530; a program takes a few, and beyond them the compiler aborts
_EVERY = 8  # tests: counting many maps takes 10 ms


def pytest_collection_modifyitems(config, items):
    """Leaves out what is slow, unless tests or cases are named. ``JAXLINEAR_TESTS``: "quick" (``make test``); "rest"
    (``make test-all``); or "ci", of the rest what a bare mark ``slow`` is on. A mark with arguments names cases that only
    ``make test-all`` runs: ``but`` all but these, ``cases`` these, ``but_nth`` all but the first and each nth after it.
    ``JAXLINEAR_NTH=n`` takes of each test's cases the first and each nth after it."""
    options = (config.getoption(name, None) for name in ("keyword", "lf", "deselect"))
    if any(options) or any("::" in argument for argument in config.args):
        return
    wanted = {"quick": (0,), "ci": (1,), "rest": (1, 2)}[os.environ.get("JAXLINEAR_TESTS", "quick")]
    nth = int(os.environ.get("JAXLINEAR_NTH", "1"))
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for test, found in cases.items():
        _check_names(test, found)
        levels = [_level(item, number) for number, item in enumerate(found)]
        taken = [item for item, level in zip(found, levels, strict=True) if level in wanted]
        kept.update(taken[::nth])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _level(item, number) -> int:
    """0 if the case is quick, 1 if it is slow, 2 if CI leaves it out."""
    level = 0
    for mark in item.iter_markers("slow"):
        if not mark.kwargs:
            level = max(level, 1)
        elif "but_nth" in mark.kwargs:
            level = 2 if number % mark.kwargs["but_nth"] else level
        else:
            named = item.callspec.id in mark.kwargs.get("but", mark.kwargs.get("cases"))
            level = 2 if named == ("cases" in mark.kwargs) else level
    return level


def _check_names(test, found):
    """Each name in a mark ``slow`` is that of a case: a wrong one would leave a case out, or none, in silence."""
    for mark in found[0].iter_markers("slow"):
        named = {*mark.kwargs.get("but", ()), *mark.kwargs.get("cases", ())}
        if unknown := named and named - {x.callspec.id for x in found}:
            raise pytest.UsageError(f"{test}: the mark slow names {sorted(unknown)}, which are no cases of it")


@pytest.fixture(scope="module")
def optimised():
    """``make test`` compiles with little optimisation; tests that compile for devices that are not present use this."""
    import jax

    # Nor are these programs cached: without such a device JAX cannot read them back, and warns about it.
    optimisations, kept = "jax_disable_most_optimizations", "jax_persistent_cache_min_compile_time_secs"
    before = {optimisations: jax.config.read(optimisations), kept: getattr(jax.config, kept)}
    with pytest.MonkeyPatch.context() as patch:  # for programs that these tests start, too
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1e9")
        for name, value in {optimisations: False, kept: 1e9}.items():
            jax.config.update(name, value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)


_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Frees compiled programs once there are many, since a worker runs a thousand tests."""
    yield
    if next(_tests) % _EVERY == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def start():
    """``start(program, *arguments)`` runs a program of ``launch/`` to its end, without the time to import JAX: for
    programs that refuse what they are given."""
    with forked.starter(XLA_FLAGS="") as starter:
        yield starter


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """A dataset of bytes: 600 short documents in blocks of 64 tokens, some 2,000 tokens of them held out."""
    from jaxlinear import data

    directory = tmp_path_factory.mktemp("tiny_dataset")
    random = np.random.default_rng(0)
    words = ["for", "x", "in", "range", "(", ")", ":", "print", "return", "def", "if", "é"]
    documents = [" ".join(random.choice(words, random.integers(2, 30))) for _ in range(600)]
    (directory / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    path = directory / "data"
    data.prepare(
        str(directory / "text.txt"),
        str(path),
        tokenizer="bytes",
        document_separator="\n",
        block_length=64,
        heldout_fraction=0.05,
        workers=1,
    )
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_dataset):
    """The config of ``tiny_run``: two steps of a Griffin of width 32 on all devices."""
    from jaxlinear import config as configs

    config = configs.default()
    config.model.update(
        {
            "pattern": ("rg_lru", "rg_lru", "sliding_window"),
            "num_layers": 3,
            "width": 32,
            "recurrent_width": 32,
            "num_heads": 4,
            "window": 8,
            "logit_soft_cap": 2.0,  # so low that leaving it out would change every loss
            "dtype": "float32",
        }
    )
    config.data.path = str(tiny_dataset)
    config.training.update({"steps": 2, "batch_size": 8, "sequence_length": 32})
    config.schedule.warmup_steps = 1
    config.checkpoint.every_steps = 1
    config.evaluation.every_steps = 0
    config.logging.update({"every_steps": 1, "tensorboard": False})
    return config


@pytest.fixture(scope="session")
def tiny_run(tiny_config, tmp_path_factory):
    """The directory of a run with checkpoints of steps 1 and 2."""
    from jaxlinear.data import load_tokenizer
    from jaxlinear.training.loop import FINISHED, train

    workdir = tmp_path_factory.mktemp("tiny_run") / "run"
    assert train(tiny_config, workdir) == FINISHED
    assert load_tokenizer(workdir).kind == "bytes"
    return workdir
