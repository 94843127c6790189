"""One run at a time in a directory."""

import errno
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

from jaxlinear import locks
from jaxlinear.errors import RunError

HOLD = """
import pathlib, sys, time
from jaxlinear import locks
with locks.of_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_second_one_is_refused_with_who_holds_it(tmp_path, monkeypatch, caplog):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(locks, "time", clock)
    with locks.of_run(tmp_path):
        before = (tmp_path / locks.FILE).read_bytes()
        assert json.loads(before)["pid"] == os.getpid()
        holder = f"the run of process {os.getpid()} on {socket.gethostname()}, started 2.*"
        with (
            caplog.at_level("INFO"),
            pytest.raises(RunError, match=f"^{holder}, is using {tmp_path}; end it first"),
            locks.of_run(tmp_path),
        ):
            pass
        assert (tmp_path / locks.FILE).read_bytes() == before
    assert len(caplog.messages) == 1 and "waiting for it, 120 seconds at most" in caplog.messages[0]
    assert now == [120.0]
    with locks.of_run(tmp_path):
        pass
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b""]


def test_one_that_ends_is_waited_for(tmp_path):
    """For example, for the previous run when a scheduler restarts it."""
    held, ended = threading.Event(), threading.Event()

    def hold():
        with locks.of_run(tmp_path):
            held.set()
            time.sleep(0.3)
            ended.set()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(240)
    with locks.of_run(tmp_path):
        assert ended.is_set()
    thread.join()


def test_a_killed_one_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 0.1)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"^the run of process {process.pid} on "), locks.of_run(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    assert json.loads((tmp_path / locks.FILE).read_text())["pid"] == process.pid
    with locks.of_run(tmp_path):
        assert json.loads((tmp_path / locks.FILE).read_text())["pid"] == os.getpid()


def test_the_first_error_is_the_one_that_is_seen(tmp_path, monkeypatch):
    """It is not the later one, from emptying the lock file on the same failing disk."""

    class File(io.FileIO):
        truncates = 0

        def truncate(self, size=None):
            self.truncates += 1
            if self.truncates > 1:
                raise OSError(errno.EIO, "the second")
            return super().truncate(size)

    monkeypatch.setattr(type(tmp_path), "open", lambda path, mode, buffering: File(path, mode[0]))
    with pytest.raises(OSError, match="the first"), locks.of_run(tmp_path):
        raise OSError(errno.ENOSPC, "the first")
    with locks.of_run(tmp_path):  # the lock is free again
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_line_says_so(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.of_run(tmp_path):
        pass
    reason = f"the file system of {tmp_path} has no locks ({os.strerror(number)})"
    assert caplog.messages == [f"{reason}: a second run started there would not be refused"]
