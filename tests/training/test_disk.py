"""A disk that is full or read-only: one line, status 2, and nothing half-written is taken for a checkpoint later."""

import os
import shlex
import subprocess

import pytest

from tests.training import tiny


def in_a_namespace(script, **options):
    """Runs a shell script that may mount file systems, which disappear when it ends."""
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory):
    """Skips the test if a process may not mount a file system, even in its own namespace."""
    try:
        done = in_a_namespace(f"mount -t tmpfs -o size=1m tmpfs {tmp_path_factory.mktemp('probe')}")
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode:
        assert "CI" not in os.environ, done.stderr  # in CI, it has to run
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")


def errors(text):
    """What launch/train.py itself says: its last line, with no traceback before it."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and text.rstrip().endswith(lines[0]), text
    return lines[0]


def test_a_disk_that_fills_up(can_mount, tmp_path, tiny_dataset):
    """Once there is room, the same command continues from what is there and finishes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ("--config.checkpoint.every_steps=2", "--config.checkpoint.keep_newest=100")
    train = shlex.join(tiny.command(disk / "run", tiny_dataset, *options))
    script = f"""
      mount -t tmpfs -o size=2m tmpfs {disk}
      {train} 2> first.txt; echo first $?
      ls {disk}/run/checkpoints
      mount -o remount,size=200m {disk}
      {train} 2> second.txt; echo second $?
      ls {disk}/run/checkpoints
      cp {disk}/run/metrics.jsonl .
    """.replace("first.txt", f"{tmp_path}/first.txt").replace("second.txt", f"{tmp_path}/second.txt")
    script = script.replace("metrics.jsonl .", f"metrics.jsonl {tmp_path}")
    done = in_a_namespace(script, cwd=tiny.REPOSITORY, env=tiny.environment())
    lines = done.stdout.split()
    second = lines.index("second")
    assert lines[:2] == ["first", "2"] and lines[second + 1] == "0", done.stdout + done.stderr
    message = errors((tmp_path / "first.txt").read_text())
    there = sorted(map(int, lines[2:second]))
    assert there and there == list(range(2, there[-1] + 1, 2)) and there[-1] < 20, "what is left is whole checkpoints"
    assert f"no space left on the disk for a checkpoint in {disk}/run/checkpoints" in message
    assert f"the newest complete one is of step {there[-1]}" in message
    assert sorted(map(int, lines[second + 2 :])) == list(range(2, 21, 2))
    assert list(tiny.losses(tmp_path)) == list(range(1, 21))


def test_a_disk_that_is_read_only(can_mount, tmp_path, tiny_dataset):
    disk = tmp_path / "disk"
    disk.mkdir()
    train = shlex.join(tiny.command(disk / "run", tiny_dataset))
    script = f"mount -t tmpfs -o ro tmpfs {disk}; exec {train}"
    done = in_a_namespace(script, cwd=tiny.REPOSITORY, env=tiny.environment())
    assert done.returncode == 2, done.stderr
    assert errors(done.stderr) == f"train.py: the file system is read-only: {disk}/run"
    assert done.stderr.count("\n") == 1
