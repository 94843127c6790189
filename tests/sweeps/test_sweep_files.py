"""What is known about a run from its files, and the tables that show it."""

import errno
import io
import os

import pytest

from jaxlinear import locks
from jaxlinear.errors import UserError
from jaxlinear.sweeps import executors, files, states, table


@pytest.fixture
def run(tmp_path):
    found = files.RunFiles(tmp_path, "run")
    found.job.mkdir(parents=True)
    found.workdir.mkdir(parents=True)
    return found


def test_attempts_survive_a_line_that_was_cut(run):
    run.begin(host="here", pid=1)
    run.log.write_text("working\nbad thing\n")
    run.end(1)
    with (run.job / "attempts.jsonl").open("a") as file:
        file.write('{"begin": 3, "ho')
    assert [(tried["pid"], tried["status"], tried["error"]) for tried in run.attempts()] == [(1, 1, "bad thing")]
    with (run.job / "attempts.jsonl").open("a") as file:
        file.write("\n")
    run.begin(host="here", pid=2)
    assert [tried["pid"] for tried in run.attempts()] == [1, 2]
    assert "end" not in run.attempts()[1]


@pytest.mark.parametrize(
    "text, last",
    [
        ("", ""),
        ("one\ntwo\n\n", "two"),
        ("Traceback\n  0%|    | 0/6\r 50%|##  | 3/6\rValueError: no\n", "ValueError: no"),
    ],
)
def test_last_line(tmp_path, text, last):
    (tmp_path / "log.txt").write_text(text, newline="")
    assert files.last_line(tmp_path / "log.txt") == last
    assert files.last_line(tmp_path / "none.txt") == ""


def test_the_lock_is_held_by_one(run, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    assert not run.is_running()
    with run.locked() as lock:
        assert lock is not None and run.is_running()
        with run.locked() as second:
            assert second is None
    assert not run.is_running()


@pytest.mark.parametrize(
    "status, state, error",
    [
        (75, states.INTERRUPTED, None),
        (-15, states.INTERRUPTED, None),
        (-9, states.FAILED, "ended by SIGKILL"),
        (2, states.FAILED, "the last words"),
        (0, states.WAITING, None),
    ],
)
def test_state_after_an_attempt(run, status, state, error):
    assert states.read(run, 10).state == states.WAITING
    run.begin(host="here", pid=1)
    assert states.read(run, 10).state == states.INTERRUPTED, "it was not seen to end"
    run.log.write_text("the last words\n")
    run.end(status)
    (run.workdir / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n{"step": 4, "heldout_loss": 2.7}\n{"step"')
    assert states.read(run, 10) == states.Progress(state, 4, 10, 2.5, 2.7, None, 1, error)
    assert states.read(run, 10, queued=True).state == states.QUEUED


ROWS = [
    ("a", states.Progress(states.FINISHED, 10, 10, 2.5, 2.75, 1234.0)),
    ("b", states.Progress(states.FAILED, 3, 10, error="it broke")),
    *((f"w{i}", states.Progress(states.WAITING, 0, 10)) for i in range(9)),
]


def test_the_table():
    lines = table.text(ROWS).split("\n")
    assert lines[0] == "11 runs: 1 finished, 1 failed, 9 waiting"
    assert lines[2].split() == ["finished", "10/10", "2.500", "2.750", "1,234", "a"]
    assert lines[3].split() == ["failed", "3/10", "b:", "it", "broke"]
    assert len(lines) == 13
    low = table.text(ROWS, height=6).split("\n")
    assert low[0] == lines[0] and len(low) == 3 and low[2] == lines[3], "what is done and what waits is only counted"


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_where_no_terminal_is_and_a_terminal_is_redrawn(monkeypatch, terminal):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((40, 30)))
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    live = table.Live(stream)
    live.show(ROWS)
    once = stream.getvalue()
    live.show(ROWS)
    if not terminal:
        assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["finished", "failed"]
        return
    assert stream.getvalue() == once + "\x1b[13A" + once, "13 lines up, and the same again"
    assert max(len(line.removeprefix("\x1b[2K")) for line in once.split("\n")) == 39


def test_gpus_are_dealt_out(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = executors.Local(tmp_path, parallel=2, gpus_per_run=2)
    assert [two._devices(slot) for slot in (0, 1)] == ["0,1", "2,3"]
    assert executors.Local(tmp_path, parallel=2)._devices(1) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert executors.Local(tmp_path, parallel=3, gpus_per_run=1)._devices(2) == "6"
    with pytest.raises(UserError, match="need 4 GPUs; CUDA_VISIBLE_DEVICES names 3"):
        two._devices(0)


def test_a_file_system_without_locks(run, monkeypatch):
    """No sweep can be made there, and nothing runs for one that was copied there."""
    (run.job / "lock").touch()

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"has no locks \(.*\), which a sweep needs .*; give it a --workdir on"):
        files.hold(run.sweep).__enter__()
    assert not run.is_running()
