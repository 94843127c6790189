"""Files are written whole or not at all."""

import os
import pathlib

import pytest

from jaxlinear import atomic
from jaxlinear.errors import UserError


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "submitted.json"
    atomic.write_text(file, "old")
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("the disk is full"))
    with pytest.raises(pytest.fail.Exception, match="full"):
        atomic.write_text(file, "new")
    assert file.read_text() == "old"


def test_two_files_that_differ_in_their_suffix_do_not_share_what_is_unfinished(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: None)  # as if both were killed at that point
    atomic.write_text(tmp_path / "run.json", "{}")
    atomic.write_text(tmp_path / "run.jsonl", "é")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json.tmp", "run.jsonl.tmp"]
    assert (tmp_path / "run.jsonl.tmp").read_bytes() == "é".encode()


@pytest.mark.skipif(not pathlib.Path("/proc/self").is_dir(), reason="not Linux")
@pytest.mark.parametrize("path", ["run", "runs/run"])
def test_a_file_system_without_new_directories_is_named_as_such(path):
    with pytest.raises(UserError, match=r"^/proc/runs? cannot be made: its file system takes no new directories$"):
        atomic.make_directory(pathlib.Path("/proc") / path)
