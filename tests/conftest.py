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


def pytest_addoption(parser):
    parser.addoption(
        "--every_mesh",
        action="store_true",
        help="Models on every mesh that spreads time, not on some, what their compiled steps exchange, and runs of several "
        "processes.",
    )
    parser.addoption(
        "--compiled",
        action="store_true",
        help="Also kernels compiled for TPUs and GPUs, and run on an emulated GPU, and what launch/compile.py says.",
    )
    parser.addoption(
        "--every_case",
        action="store_true",
        help="All cases of the tests from which, as they say by the mark some_cases, other runs take some.",
    )
    parser.addoption("--published_sizes", action="store_true", help="Also training steps at published sizes: minutes.")
    parser.addoption("--chromium", help="Also pages of HTML, in this Chromium.")
    parser.addoption(
        "--every_nth", type=int, default=1, metavar="N", help="Of each test's cases, the first and each Nth after it."
    )


@pytest.hookimpl(trylast=True)  # of the cases that -k leaves
def pytest_collection_modifyitems(config, items):
    nth, before = config.getoption("--every_nth"), collections.Counter()
    if nth < 1:
        raise pytest.UsageError(f"--every_nth={nth} must be at least 1")
    # Whoever names tests or cases means all of them.
    options = (config.getoption(name, None) for name in ("keyword", "lf", "deselect"))
    named = any(options) or any("::" in argument for argument in config.args)
    every = named or config.getoption("--every_case")
    if not named:
        _check_names(items)
    kept, left_out = [], []
    for item in items:
        test, mark = item.nodeid.partition("[")[0], None if every else item.get_closest_marker("some_cases")
        if mark and not _is_taken(item.callspec.id, *mark.args, **mark.kwargs):
            left_out.append(item)
            continue
        step = nth * mark.kwargs.get("nth", 1) if mark else nth
        (left_out if before[test] % step else kept).append(item)
        before[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _check_names(items):
    """Each name in a mark ``some_cases`` is that of a case: a wrong one would leave a case out, or none, in silence."""
    named, there = {}, collections.defaultdict(set)
    for item in items:
        if mark := item.get_closest_marker("some_cases"):
            test = item.nodeid.partition("[")[0]
            named[test] = {*mark.args, *mark.kwargs.get("without", ())}
            there[test].add(item.callspec.id)
    for test, names in named.items():
        if unknown := names - there[test]:
            raise pytest.UsageError(
                f"{test}: some_cases names {sorted(unknown)}, and the cases are {sorted(there[test])}"
            )


def _is_taken(case, *only, without=(), nth=1):
    """The arguments of the mark ``some_cases``; ``nth`` is for whoever counts."""
    return case not in without and (not only or case in only)


def pytest_ignore_collect(collection_path, config):
    on_request = {
        "test_published_sizes.py": "published_sizes",
        "test_compiled_collectives.py": "every_mesh",
        "test_processes.py": "every_mesh",
        "test_in_chromium.py": "chromium",
        "test_on_an_emulated_gpu.py": "compiled",
        "test_sizing.py": "compiled",
    }
    if collection_path.match("pallas/test_*_compiles.py"):
        on_request[collection_path.name] = "compiled"
    option = on_request.get(collection_path.name)
    if option is not None and not config.getoption(option):
        return True


@pytest.fixture(autouse=True, scope="module")
def optimised(request):
    """``make test`` compiles with little optimisation, except for devices that are not present."""
    if request.node.get_closest_marker("compiles_ahead") is None:
        yield
        return
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
