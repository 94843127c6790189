"""launch/submit.py --platform=local: a run as processes on this machine, which is stopped, restarted, and refused."""

import json
import signal
import subprocess
import sys
import time

import pytest

from jaxlinear.errors import RunError, UserError
from jaxlinear.parallel import distributed
from jaxlinear.training.metrics import FILE
from tests.training import tiny


@pytest.fixture
def submit(tiny_dataset):
    """``submit(target, processes, workdir, *arguments)`` starts it; it is told to end, however the test ends."""
    running = []

    def begin(target, processes, workdir, *arguments):
        options = tiny.command(workdir, tiny_dataset, *arguments)[len(tiny.program()) :]
        program = [sys.executable, "launch/submit.py", "--platform=local", f"--target={target}"]
        process = subprocess.Popen(
            [*program, f"--processes={processes}", "--requeue", "--", *options],
            cwd=tiny.REPOSITORY,
            env=tiny.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        process.stderr.close()


def test_a_run_of_two_processes_is_stopped_and_goes_on(submit, tmp_path):
    workdir = tmp_path / "run"
    rarely = "--config.checkpoint.every_steps=1000"
    process = submit("cpu:2", 2, workdir, rarely, "--config.training.steps=100000")
    begin = time.monotonic()
    while not (workdir / FILE).exists() or len((workdir / FILE).read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() - begin < 240
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 75, process.stderr.read()
    stopped = len(tiny.losses(workdir))
    assert stopped >= 3

    process = submit("cpu:2", 2, workdir, rarely, f"--config.training.steps={stopped + 2}")
    assert process.wait(240) == 0, process.stderr.read()
    assert list(tiny.losses(workdir)) == list(range(1, stopped + 3))
    assert json.loads((workdir / "config.json").read_text())["training"]["steps"] == stopped + 2


def test_devices_that_are_not_there(submit, tmp_path):
    process = submit("cpu:4", 2, tmp_path / "run")
    assert process.wait(240) == 1
    said = "4 cpu devices are expected in total, but process 0, 1 sees 1 cpu"
    assert process.stderr.read().count(said) == 2
    assert not (tmp_path / "run").exists()


def test_expect_here():
    distributed.expect("cpu:8")
    alone = "it runs alone: were the other processes not found"
    with pytest.raises(RunError, match=f"16 cpu devices are expected in total, but process 0 sees 8 cpu; {alone}"):
        distributed.expect("cpu:16")
    with pytest.raises(RunError, match="8 gpu devices are expected in total, but process 0 sees 8 cpu"):
        distributed.expect("gpu:8")
    with pytest.raises(UserError, match="--expect='eight' must be PLATFORM:DEVICES"):
        distributed.expect("eight")


@pytest.mark.parametrize(
    "environment, ids",
    [
        ({"SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        ({"SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_one_process_a_node_has_all_its_gpus(environment, ids, monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._gpus_of_a_node() == ids
