"""A sweep of trained runs by launch/sweep.py, killed halfway and started again.

``python -m tests.sweeps.killed_sweep 12`` does it with twelve runs; the test, with two.
"""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

from jaxlinear.sweeps import states
from jaxlinear.sweeps.sweep import read
from jaxlinear.training import metrics
from tests.training import tiny

PATIENCE = 900
STEPS = 6
SWEEP = f"""
from jaxlinear import config as configs
from jaxlinear.sweeps import plans

def get_config():
    config = configs.default()
    config.model.update({{
        "pattern": ("rg_lru", "sliding_window"), "num_layers": 2, "vocab_size": 384, "width": 32, "recurrent_width": 32,
        "num_heads": 4, "window": 8, "dtype": "float32",
    }})
    config.training.update({{"steps": {STEPS}, "batch_size": 8, "sequence_length": 32}})
    config.schedule.warmup_steps = 1
    config.checkpoint.every_steps = 1
    config.evaluation.update({{"every_steps": {STEPS}, "batches": 1}})
    config.logging.update({{"every_steps": 1, "tensorboard": False}})
    return config

def get_runs(config):
    return plans.grid({{"KEY": list(range(RUNS))}})
"""


# Python to run at the start of launch/sweep.py: it makes another program train the runs.
TRAINS = """
from jaxlinear.sweeps import manager
init = manager.Manager.__init__
manager.Manager.__init__ = lambda self, sweep, executor, train: init(self, sweep, executor, PROGRAM)
"""


def start(directory, dataset, *, runs, stops=None):
    """Starts launch/sweep.py in its own process group. The run with the seed ``stops`` waits in its 5th step."""
    before = ""
    if stops is not None:
        of_that = f"import sys\nif sys.argv[-1].endswith('/seed={stops}'):\n"
        train = tiny.program(before=of_that + textwrap.indent(tiny.STOPS.replace("STEP", "5"), "    "))
        before = TRAINS.replace("PROGRAM", repr(train))
    file = directory / "small.py"
    file.write_text(SWEEP.replace("KEY", "training.seed").replace("RUNS", str(runs)))
    options = {"config": file, "workdir": directory / "sweep", "config.data.path": dataset}
    return subprocess.Popen(
        [*tiny.program("launch/sweep.py", before), *(f"--{name}={value}" for name, value in options.items())],
        **dict(cwd=tiny.REPOSITORY, env=tiny.environment(), text=True, start_new_session=True),
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE),
    )


def check(directory, dataset, runs):
    """Kills the sweep during run ``runs // 2``, starts it again, and asserts that it completes: the finished runs are as
    they were, the interrupted run resumes from a checkpoint, and every other run is begun only once."""
    workdirs = [directory / "sweep" / "runs" / f"seed={seed}" for seed in range(runs)]
    half = runs // 2
    process, begin = start(directory, dataset, runs=runs, stops=half), time.monotonic()
    while not (workdirs[half] / "checkpoints" / "2").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = [tiny.files(workdir) for workdir in workdirs[:half]]

    process = start(directory, dataset, runs=runs)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == f"{runs} runs: {runs} finished"
    assert [tiny.files(workdir) for workdir in workdirs[:half]] == before
    for workdir in workdirs:
        assert [line["step"] for line in metrics.read(workdir) if "loss" in line] == list(range(1, STEPS + 1))
    planned = read(directory / "sweep").runs
    assert [run.progress().state for run in planned] == [states.FINISHED] * runs
    assert [len(run.files.attempts()) for run in planned] == [2 if i == half else 1 for i in range(runs)]
    assert "resuming from step" in planned[half].files.log.read_text()
    assert len({run.progress().heldout_loss for run in planned}) == runs


if __name__ == "__main__":
    from absl import logging

    from jaxlinear import data

    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        directory, begin = pathlib.Path(folder), time.monotonic()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory / "programs")  # all its runs share one program
        (directory / "text.txt").write_text("\n".join(f"for x in range({i}): print({i * i})" for i in range(2000)))
        data.prepare(str(directory / "text.txt"), directory / "data", tokenizer="bytes", document_separator="\n")
        check(directory, directory / "data", int(sys.argv[1]))
        seconds = time.monotonic() - begin
        print(f"{sys.argv[1]} runs, killed half way, are complete and none was done twice: {seconds:.0f} s")
