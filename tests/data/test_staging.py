"""What killed runs left beside a dataset: removed if its writer has certainly died, otherwise reported."""

import errno
import os

import pytest

from jaxlinear import locks
from jaxlinear.data import staging

NAME = ".data.partial-0123abcd"
HERE = staging.socket.gethostname()


def killed(tmp_path, *, host: str | None = None, name=NAME):
    """What a killed writer leaves; ``host`` is None for one that held no lock."""
    (tmp_path / name / "train").mkdir(parents=True)
    if host is not None:
        (tmp_path / name / locks.FILE).write_text(host)
    return tmp_path / name


def test_a_dead_one_of_this_host_is_removed(tmp_path, caplog):
    left = killed(tmp_path, host=HERE)
    names = ("data", ".other.partial-0123abcd", ".data.partial-mine", "data.partial-01234567")
    others = [killed(tmp_path, host=HERE, name=name) for name in names]
    staging.clear(tmp_path / "data")
    assert caplog.messages == [f"removed {left}, left by a run that was killed"]
    assert sorted(tmp_path.iterdir()) == sorted(others) and all((other / locks.FILE).exists() for other in others)


def test_one_that_is_at_work_is_left_alone(tmp_path, caplog):
    with staging.directory(tmp_path / "data") as partial:
        (partial / "train").mkdir()
        staging.clear(tmp_path / "data")
        assert (partial / "train").is_dir() and sorted(os.listdir(partial)) == [locks.FILE, "train"]
        staging.unlock(partial)
        assert os.listdir(partial) == ["train"]
        staging.clear(tmp_path / "data")
        assert partial.is_dir()  # it no longer has a lock, or does not have one yet
    (message,) = caplog.messages
    assert message.startswith(f"{partial} belongs to a run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "host, name, key",
    [
        ("another", NAME, "belongs to a run"),
        (None, NAME, "belongs to a run"),
        (None, ".data.old-0123abcd", "moved aside"),
    ],
)
def test_one_that_may_be_at_work_or_was_moved_aside_is_named(tmp_path, caplog, host, name, key):
    left = killed(tmp_path, host=host, name=name)
    staging.clear(tmp_path / "data")
    (message,) = caplog.messages
    assert message.startswith(str(left)) and key in message and (left / "train").is_dir()
    staging.clear(tmp_path / "none" / "data")  # there may be no folder yet


def test_where_there_are_no_locks(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with staging.directory(tmp_path / "data") as partial:
        assert os.listdir(partial) == []
    left = killed(tmp_path, host=HERE)
    staging.clear(tmp_path / "data")
    assert len(caplog.messages) == 1 and left.is_dir()
