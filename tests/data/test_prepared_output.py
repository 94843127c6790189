"""Where a prepared dataset goes: all or nothing, and an older one gives way only to a complete one."""

import errno
import os
import pathlib

import pytest

from jaxlinear.data import prepare, read_manifest
from jaxlinear.data.blocks import SplitWriter
from jaxlinear.data.manifest import Manifest
from jaxlinear.data.sources import open_source
from jaxlinear.errors import UserError
from tests.data.sources_of_text import files, make_texts, write_jsonl
from tests.data.test_sources import tree

OPTIONS = {"tokenizer": "bytes", "heldout_fraction": 0.3, "workers": 1}


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60))


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def refused(key, *arguments, **options) -> None:
    with pytest.raises(UserError, match=key):
        prepare(*arguments, **{**OPTIONS, **options})


def test_existing_output(tmp_path, source, data):
    """An empty directory counts as none. Nothing but a dataset is removed: not, for example, a source inside it."""
    data.mkdir()
    prepare(source, data, block_length=64, **OPTIONS)
    before = files(data)
    refused("already exists; --overwrite", source, data, block_length=32)
    assert files(data) == before
    prepare(source, data, block_length=32, overwrite=True, **OPTIONS)
    assert read_manifest(data).block_length == 32
    (data / "text").mkdir()
    inside = write_jsonl(data / "text" / "a.jsonl", make_texts(0, 60))
    refused("data holds text", inside, data, overwrite=True)
    assert os.listdir(data / "text") == ["a.jsonl"]
    (data / "manifest.json").unlink()
    refused("is not a prepared dataset", source, data, overwrite=True)
    refused(r"a\.jsonl is a file, not a directory", source, tmp_path / "a.jsonl/data")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"]


def test_a_dataset_in_its_own_source_is_not_read(tmp_path, data, caplog):
    """Its manifest is also JSON and would be taken for text."""
    for i, text in enumerate(make_texts(0, 60)):
        (tmp_path / f"{i}.txt").write_text(text)
    prepare(str(tmp_path), data, **OPTIONS)
    before = files(data)
    with caplog.at_level("INFO", logger="jaxlinear"):
        prepare(str(tmp_path), data, overwrite=True, **OPTIONS)
    assert caplog.messages == [f"{tmp_path}: leaving out the prepared datasets in it: {data}"]
    assert files(data) == before
    refused("data is a prepared dataset", str(data), tmp_path / "again")
    names = ("manifest.json", "train/a.txt", "heldout/b.txt")  # which is not a dataset of ours
    tree(tmp_path / "corpus", dict.fromkeys(names, '{"text": "one"}'))
    assert len(list(open_source(str(tmp_path / "corpus")))) == 3


def test_a_mounted_disk_is_refused_before_the_work(tmp_path, source, data, monkeypatch):
    """The work would be in vain, since a mount cannot be renamed."""
    data.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(data))
    refused("data is a mount point", source, data)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"] and os.listdir(data) == []
    prepare(source, data / "in", **OPTIONS)


@pytest.mark.parametrize("there", ["dataset", "empty directory", "nothing"])
def test_output_through_a_link(tmp_path, source, there):
    """The dataset appears where the link points; the link stays, and nothing is left beside either."""
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "data", tmp_path / "link"
    if there == "dataset":
        prepare(source, target, block_length=64, **OPTIONS)
    elif there == "empty directory":
        target.mkdir()
    link.symlink_to(target)
    prepare(source, link, block_length=32, overwrite=there == "dataset", **OPTIONS)
    assert link.is_symlink() and read_manifest(target).block_length == 32
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "disk", "link"] and os.listdir(tmp_path / "disk") == ["data"]


def test_full_disk_leaves_nothing_behind(tmp_path, source, data, monkeypatch):
    monkeypatch.setattr(SplitWriter, "_shard_path", lambda self: pathlib.Path("/dev/full"))
    with pytest.raises(OSError) as raised:
        prepare(source, data, **OPTIONS)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/dev/full")
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_interruption_leaves_nothing_behind(tmp_path, source, data, monkeypatch, overwrite):
    """At the last moment, when only the manifest is missing; an older dataset remains."""
    if overwrite:
        prepare(source, data, block_length=64, **OPTIONS)
    before = files(tmp_path)

    def interrupt(self, directory):
        assert (directory / "train/00000.array_record").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, data, overwrite=overwrite, **OPTIONS)
    assert files(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == (["a.jsonl", "data"] if overwrite else ["a.jsonl"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_older_dataset_is_back_after_an_end_between_the_renames(tmp_path, source, data, monkeypatch, error):
    prepare(source, data, block_length=64, **OPTIONS)
    before = files(tmp_path)
    rename = pathlib.Path.rename

    def ended(self, target):
        if ".partial-" in self.name:
            assert not (data).exists()
            raise error
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", ended)
    with pytest.raises(error):
        prepare(source, data, overwrite=True, **OPTIONS)
    assert files(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"]


def test_what_another_run_made_meanwhile_stays(tmp_path, source, data, monkeypatch):
    write = Manifest.write

    def make_another(self, directory):
        monkeypatch.setattr(Manifest, "write", write)
        prepare(source, data, block_length=64, **OPTIONS)
        write(self, directory)

    monkeypatch.setattr(Manifest, "write", make_another)
    refused("already exists; --overwrite", source, data, block_length=32)
    assert read_manifest(data).block_length == 64
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"]
