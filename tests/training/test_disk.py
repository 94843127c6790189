"""A disk that is full or read-only: one line, status 2, and nothing half-written is taken for a checkpoint later."""

import os
import shlex
import subprocess

import pytest

from tests.training import tiny


@pytest.fixture
def mounted(tmp_path):
    """``mounted(options, script)`` runs a shell script where tmp_path/disk is a new file system, which disappears when it
    ends. The test is skipped if a process may not mount one, even in its own namespace."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(options, script):
        command = [
            "unshare",
            "--mount",
            "--map-root-user",
            "sh",
            "-c",
            f"mount -t tmpfs -o {options} tmpfs {disk}\n{script}",
        ]
        given = {"cwd": tiny.REPOSITORY, "env": tiny.environment(), "timeout": tiny.PATIENCE}
        return subprocess.run(command, capture_output=True, text=True, **given)

    try:
        done = run("size=1m", "exit $?")
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode:
        assert "CI" not in os.environ, done.stderr  # in CI, it has to run
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    return run


def errors(text):
    """What launch/train.py itself says: its last line, with no traceback before it."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and text.rstrip().endswith(lines[0]), text
    return lines[0]


@pytest.mark.slow
def test_a_disk_that_fills_up(mounted, tmp_path, tiny_dataset):
    """Once there is room, the same command continues from what is there and finishes."""
    disk, options = tmp_path / "disk", ("--config.checkpoint.every_steps=2", "--config.checkpoint.keep_newest=100")
    train = shlex.join(tiny.command(disk / "run", tiny_dataset, *options))
    script = f"""
      {train} 2> {tmp_path}/errors; echo first $?
      ls {disk}/run/checkpoints
      mount -o remount,size=200m {disk}
      {train}; echo second $?
      ls {disk}/run/checkpoints
      cp {disk}/run/metrics.jsonl {tmp_path}
    """
    done = mounted("size=2m", script)
    lines = done.stdout.split()
    second = lines.index("second")
    assert lines[:2] == ["first", "2"] and lines[second + 1] == "0", done.stdout + done.stderr
    message = errors((tmp_path / "errors").read_text())
    there = sorted(map(int, lines[2:second]))
    assert there and there == list(range(2, there[-1] + 1, 2)) and there[-1] < 20, "what is left is whole checkpoints"
    assert f"no space left on the disk for a checkpoint in {disk}/run/checkpoints" in message
    assert f"the newest complete one is of step {there[-1]}" in message
    assert sorted(map(int, lines[second + 2 :])) == list(range(2, 21, 2))
    assert list(tiny.losses(tmp_path)) == list(range(1, 21))


def test_a_disk_that_is_read_only(mounted, tmp_path, tiny_dataset):
    run = tmp_path / "disk" / "run"
    done = mounted("ro", f"exec {shlex.join(tiny.command(run, tiny_dataset))}")
    assert done.returncode == 2, done.stderr
    assert errors(done.stderr) == f"train.py: the file system is read-only: {run}"
    assert done.stderr.count("\n") == 1
