"""How a run shows its progress: lines in a log, and on a terminal a bar below the messages."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from jaxlinear.training import progress
from tests.training import tiny

_PROGRAM = """
import logging, sys
from jaxlinear.training.progress import Progress
logger = logging.getLogger("jaxlinear")
logger.setLevel(logging.INFO)
logger.addHandler(logging.StreamHandler())
shown = Progress(step=2, steps=9)
logger.info("compiled")
shown.at(5, loss=2.5, tokens_per_second=1234.5, step_seconds=61.0)
shown.evaluated(5, {"heldout_loss": 2.25, "heldout_bits_per_byte": 3.25})
shown.at(7, loss=1.5, tokens_per_second=2000.0, step_seconds=61.0)
shown.at(9, loss=1.25, tokens_per_second=2000.0, step_seconds=61.0)
shown.close()
logger.info("after")
"""


def run(stderr):
    return subprocess.run([sys.executable, "-c", _PROGRAM], stderr=stderr, cwd=tiny.REPOSITORY, check=True, timeout=240)


def test_in_a_log_it_is_lines():
    """Step 7 comes within 20 s of the line before; the last step has a line anyway."""
    assert run(subprocess.PIPE).stderr.decode().splitlines() == [
        "compiled",
        "step 5 of 9: loss 2.500, 1,234 tokens/s, 04:04 left",
        "step 5: heldout_loss 2.25, heldout_bits_per_byte 3.25",
        "step 9 of 9: loss 1.250, 2,000 tokens/s, 00:00 left",
        "after",
    ]


def test_on_a_terminal_messages_stand_above_the_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    run(theirs)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    # What the screen shows of each line: a carriage return starts it anew.
    screen = [line.rstrip("\r").split("\r")[-1].rstrip() for line in text.split("\n")]
    assert screen[:2] == ["compiled", "step 5: heldout_loss 2.25, heldout_bits_per_byte 3.25"]
    assert "9/9" in screen[2] and "loss=1.250, tok/s=2,000" in screen[2] and "2/9" in text
    assert screen[3:] == ["after", ""]


@pytest.mark.parametrize("seconds, first, lines", [(19.0, True, 1), (21.0, True, 2), (21.0, False, 0)])
def test_a_line_every_twenty_seconds(monkeypatch, caplog, seconds, first, lines):
    """Other processes than the first show nothing, nor what is evaluated."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress.distributed, "is_first", lambda: first)
    shown = progress.Progress(step=0, steps=9)
    with caplog.at_level("INFO", logger="jaxlinear"):
        for step in (1, 2):
            shown.at(step, loss=1.0, tokens_per_second=1.0, step_seconds=1.0)
            now += seconds
        shown.evaluated(2, {"heldout_loss": 1.0})
    starts = ["step 1 of 9: loss 1.000, ", "step 2 of 9: "][:lines] + ["step 2: heldout_loss"] * first
    assert all(map(str.startswith, caplog.messages, starts)) and len(caplog.messages) == len(starts)
