"""A run that hangs ends with a reason; one that works, compiles or was suspended does not."""

import signal
import subprocess
import sys
import time

import pytest

from jaxlinear.training.watchdog import Watchdog
from tests.training import tiny


def test_a_run_that_hangs_ends_with_what_it_was_doing(launch, tmp_path):
    hasty = ("--config.training.patience_minutes=0.1", "--config.checkpoint.every_steps=1000")
    process = launch(tmp_path / "run", *hasty, before=tiny.STOPS.replace("STEP", "6"))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert errors.splitlines()[-1] == (
        "train.py: no sign of life for 0.1 minutes in the reading of the batch of step 6 (training.patience_minutes); "
        "above are the stacks of this process. The same command goes on from the newest checkpoint"
    )
    assert "in waits_for_a_file_server" in errors
    assert list(tiny.losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.fixture
def ended(monkeypatch):
    found = []
    monkeypatch.setattr(Watchdog, "_end", lambda watchdog, what: found.append(what))
    return found


@pytest.mark.parametrize("minutes, reason", [(0.005, ["a step"]), (0.0, [])])
def test_what_lasts_too_long(ended, minutes, reason):
    with Watchdog(minutes) as watchdog:
        watchdog.start()
        watchdog.at("a step")
        time.sleep(1)
    assert ended[:1] == reason


def test_signs_of_life_and_rests(ended):
    with Watchdog(0.01) as watchdog:  # 0.6 s
        watchdog.at("the first step, which is not counted")
        time.sleep(1)
        watchdog.start()
        for _ in range(5):
            watchdog.at("a step")
            time.sleep(0.2)
        watchdog.rest()
        watchdog.at("an evaluation that compiles")
        time.sleep(1)
    assert ended == []


SUSPENDED = """
import time
from jaxlinear.training.watchdog import Watchdog
with Watchdog(0.05) as watchdog:
    watchdog.start()
    watchdog.at("a step")
    print("begun", flush=True)
    time.sleep(1)
print("went on")
"""


def test_a_process_that_was_suspended_goes_on():
    """For longer than it may be silent: 3 s."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED], stdout=subprocess.PIPE, text=True, cwd=tiny.REPOSITORY
    )
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[0] == "went on\n" and process.returncode == 0
    finally:
        process.kill()
        process.wait()
