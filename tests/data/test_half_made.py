"""What killed runs left beside a dataset: removed if its writer has certainly died, otherwise reported."""

import errno
import os

import pytest

from jaxlinear import locks
from jaxlinear.data import half_made

NAME = ".data.partial-0123abcd"


def killed(tmp_path, *, host: str | None = None, name=NAME):
    """What a killed writer leaves; ``host`` is None for one that held no lock."""
    (tmp_path / name / "train").mkdir(parents=True)
    if host is not None:
        (tmp_path / name / locks.FILE).write_text(host)
    return tmp_path / name


def test_a_dead_one_of_this_host_is_removed(tmp_path, caplog):
    left = killed(tmp_path, host=half_made.socket.gethostname())
    others = [
        tmp_path / name for name in ("data", ".other.partial-0123abcd", ".data.partial-mine", "data.partial-01234567")
    ]
    for other in others:
        killed(tmp_path, host=half_made.socket.gethostname(), name=other.name)
    half_made.clear(tmp_path / "data")
    assert caplog.messages == [f"removed {left}, left by a run that was killed"]
    assert sorted(tmp_path.iterdir()) == sorted(others) and all((other / locks.FILE).exists() for other in others)


def test_one_that_is_at_work_is_left_alone(tmp_path, caplog):
    with half_made.directory(tmp_path / "data") as partial:
        (partial / "train").mkdir()
        half_made.clear(tmp_path / "data")
        assert (partial / "train").is_dir() and sorted(os.listdir(partial)) == [locks.FILE, "train"]
        half_made.unlock(partial)
        assert os.listdir(partial) == ["train"]
        half_made.clear(tmp_path / "data")
        assert partial.is_dir()  # it no longer has a lock, or does not have one yet
    assert caplog.messages == [
        f"{partial} belongs to a run that was killed or is still writing; remove it if no run is writing"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["another", None])
def test_one_that_may_be_at_work_is_named(tmp_path, caplog, host):
    left = killed(tmp_path, host=host)
    half_made.clear(tmp_path / "data")
    assert caplog.messages == [
        f"{left} belongs to a run that was killed or is still writing; remove it if no run is writing"
    ]
    assert (left / "train").is_dir()


def test_a_dataset_that_was_moved_aside_is_named(tmp_path, caplog):
    old = killed(tmp_path, name=".data.old-0123abcd")
    half_made.clear(tmp_path / "data")
    assert caplog.messages == [f"{old} was moved aside by an --overwrite that was killed; remove it, or move it back"]
    assert (old / "train").is_dir()


def test_where_there_are_no_locks(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with half_made.directory(tmp_path / "data") as partial:
        assert os.listdir(partial) == []
    left = killed(tmp_path, host=half_made.socket.gethostname())
    half_made.clear(tmp_path / "data")
    assert len(caplog.messages) == 1 and left.is_dir()


def test_there_may_be_no_folder_yet(tmp_path):
    half_made.clear(tmp_path / "none" / "data")
