"""launch/submit.py --platform=local: a run as processes on this machine, which is stopped, restarted, and refused."""

import json
import signal
import subprocess

import pytest

from jaxlinear.errors import RunError, UserError
from jaxlinear.parallel import distributed
from tests.training import tiny


@pytest.fixture
def submit(tiny_dataset):
    """``submit(target, workdir, *arguments)`` starts a run of two processes; it is told to end, however the test ends."""
    running = []

    def begin(target, workdir, *arguments):
        options = tiny.command(workdir, tiny_dataset, *arguments)[len(tiny.program()) :]
        program = [
            *tiny.program("launch/submit.py"),
            "--platform=local",
            f"--target={target}",
            "--processes=2",
            "--requeue",
        ]
        given = {"cwd": tiny.REPOSITORY, "env": tiny.environment(), "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([*program, "--", *options], **given))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        process.stderr.close()


@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_and_goes_on(submit, tmp_path):
    workdir, rarely = tmp_path / "run", "--config.checkpoint.every_steps=1000"
    process = submit("cpu:2", workdir, rarely, "--config.training.steps=100000")
    tiny.wait_for([process], lambda: tiny.last_step(workdir) >= 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(tiny.PATIENCE) == 75, process.stderr.read()
    stopped = len(tiny.losses(workdir))
    assert stopped >= 3

    process = submit("cpu:2", workdir, rarely, f"--config.training.steps={stopped + 2}")
    assert process.wait(tiny.PATIENCE) == 0, process.stderr.read()
    assert list(tiny.losses(workdir)) == list(range(1, stopped + 3))
    assert json.loads((workdir / "config.json").read_text())["training"]["steps"] == stopped + 2


@pytest.mark.slow
def test_devices_that_are_not_there(submit, tmp_path):
    process = submit("cpu:4", tmp_path / "run")
    assert process.wait(tiny.PATIENCE) == 1
    said = "4 cpu devices are expected in total, but process 0, 1 sees 1 cpu"
    assert process.stderr.read().count(said) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "target, error, message",
    [
        ("cpu:16", RunError, "16 cpu .* process 0 sees 8 cpu; it runs alone: were the other processes not found"),
        ("gpu:8", RunError, "8 gpu devices are expected in total, but process 0 sees 8 cpu"),
        ("eight", UserError, "--expect='eight' must be PLATFORM:DEVICES"),
    ],
)
def test_expect_here(target, error, message):
    distributed.expect("cpu:8")
    with pytest.raises(error, match=message):
        distributed.expect(target)


@pytest.mark.parametrize(
    "tasks, visible, ids",
    [
        ("1(x2)", "0,1,2,3", [0, 1, 2, 3]),
        ("8(x2)", "0,1,2,3", None),
        ("1", "0", None),
        (None, "0,1", None),  # not of SLURM
    ],
)
def test_one_process_a_node_has_all_its_gpus(tasks, visible, ids, monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if tasks:
        monkeypatch.setenv("SLURM_PROCID", "0")
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    assert distributed._gpus_of_a_node() == ids
