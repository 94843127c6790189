"""A run that hangs is ended with a reason; one that works, compiles or was suspended is not."""

import signal
import subprocess
import sys
import time
import types

import pytest

from jaxlinear.training.watchdog import _LOOKS, Watchdog
from tests.training import tiny


@pytest.mark.slow
def test_a_run_that_hangs_ends_with_what_it_was_doing(launch, tmp_path):
    hasty = ("--config.training.patience_minutes=0.1", "--config.checkpoint.every_steps=1000")
    process = launch(tmp_path / "run", *hasty, before=tiny.STOPS.replace("STEP", "6"))
    _, errors = process.communicate(timeout=tiny.PATIENCE)
    assert process.returncode == 1, errors
    assert errors.splitlines()[-1] == (
        "train.py: no sign of life for 0.1 minutes in the reading of the batch of step 6 (training.patience_minutes); "
        "above are the stacks of this process. The same command resumes from the newest checkpoint"
    )
    assert "in waits_for_a_file_server" in errors
    assert list(tiny.losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.fixture
def ended(monkeypatch):
    found = []
    monkeypatch.setattr(Watchdog, "_end", lambda watchdog, what: found.append(what))
    return found


@pytest.mark.parametrize("patience, reason", [(0.005, ["a step"]), (0.0, [])])
def test_what_lasts_too_long(ended, patience, reason):
    """With a patience of 0 minutes, nothing does."""
    begin = time.monotonic()
    with Watchdog(patience) as watchdog:
        watchdog.start()
        watchdog.at("a step")
        while not ended and time.monotonic() - begin < (tiny.PATIENCE if patience else 0.2):
            time.sleep(0.05)
    assert ended[:1] == reason


def missed(watchdog):
    watchdog.start()
    watchdog.at("a step")
    yield _LOOKS + 1


def in_time(watchdog):
    watchdog.at("the first step, which is not counted")
    yield 2 * _LOOKS
    watchdog.start()
    for _ in range(5):
        watchdog.at("a step")
        yield _LOOKS
    watchdog.rest()
    watchdog.at("an evaluation that compiles")
    yield 2 * _LOOKS


@pytest.mark.parametrize("life, reason", [(missed, ["a step"]), (in_time, [])])
def test_signs_of_life_and_rests(ended, life, reason):
    """A life says after each sign how often the watchdog looks next."""
    watchdog = Watchdog(1.0)
    looks = (False for count in life(watchdog) for _ in range(count))
    watchdog._over = types.SimpleNamespace(wait=lambda seconds: next(looks, True))
    watchdog._watch()
    assert ended == reason


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
    """It is suspended for longer than the 3 s for which it may be silent."""
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED], stdout=subprocess.PIPE, text=True, cwd=tiny.REPOSITORY
    )
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=240)[0] == "went on\n" and process.returncode == 0
    finally:
        process.kill()
        process.wait()
