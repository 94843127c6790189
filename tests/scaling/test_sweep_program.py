"""launch/sweep.py with launch/train.py: runs that are trained, killed, and trained to their end. What more there is to a
sweep is tried in test_manager.py, with runs that cost nothing."""

import os
import signal
import subprocess
import sys
import time

from jaxlinear.scaling.sweeps import states
from jaxlinear.scaling.sweeps.sweep import read
from jaxlinear.training import metrics
from tests.training import tiny

PATIENCE = 240
STEPS = 6
SWEEP = f"""
from jaxlinear import config as configs
from jaxlinear.scaling.sweeps import plans

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
    return plans.grid({{"KEY": [0, 1]}})
"""


def start(tmp_path, dataset, key="training.seed", *arguments):
    file = tmp_path / "small.py"
    file.write_text(SWEEP.replace("KEY", key))
    options = {"config": file, "workdir": tmp_path / "sweep", "config.data.path": dataset}
    return subprocess.Popen(
        [sys.executable, "launch/sweep.py", *(f"--{name}={value}" for name, value in options.items()), *arguments],
        cwd=tiny.REPOSITORY,
        env=tiny.environment(tmp_path / "programs"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait(process, condition):
    begin = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.01)


def test_killed_in_its_second_run_it_trains_that_run_on_and_the_first_no_more(tiny_dataset, tmp_path):
    first, second = (tmp_path / "sweep" / "runs" / f"seed={seed}" for seed in (0, 1))
    process = start(tmp_path, tiny_dataset)
    wait(process, lambda: (second / "checkpoints" / "2").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = tiny.files(first)
    assert metrics.read(first)[-1]["step"] == STEPS

    process = start(tmp_path, tiny_dataset)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert tiny.files(first) == before
    assert [line["step"] for line in metrics.read(second) if "loss" in line] == list(range(1, STEPS + 1))
    assert output.splitlines()[-1] == "2 runs: 2 finished"
    runs = read(tmp_path / "sweep").runs
    assert [run.progress().state for run in runs] == [states.FINISHED] * 2
    assert [len(run.files.attempts()) for run in runs] == [1, 2]
    assert "going on from step" in runs[1].files.log.read_text()
    assert runs[0].progress().heldout_loss != runs[1].progress().heldout_loss


def test_an_unknown_key_is_refused_before_anything_is_written(tiny_dataset, tmp_path):
    process = start(tmp_path, tiny_dataset, "training.sead")
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (2, "")
    assert errors == "sweep.py: there is no config key 'training.sead'; did you mean 'training.seed'?\n"
    assert not (tmp_path / "sweep").exists()
