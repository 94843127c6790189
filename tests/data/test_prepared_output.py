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


def test_existing_output(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60))
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "workers": 1}
    data = tmp_path / "data"
    data.mkdir()
    prepare(source, data, block_length=64, **options)  # an empty directory counts as none
    before = files(data)
    with pytest.raises(UserError, match="data already exists; --overwrite replaces it"):
        prepare(source, data, block_length=32, **options)
    assert files(data) == before
    prepare(source, data, block_length=32, overwrite=True, **options)
    assert read_manifest(data).block_length == 32
    (data / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"is not a prepared dataset \(it has no manifest\.json\), so --overwrite leaves"
    ):
        prepare(source, data, overwrite=True, **options)
    with pytest.raises(UserError, match=r"a\.jsonl is a file, not a directory"):
        prepare(source, tmp_path / "a.jsonl/data", **options)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"]


def test_overwrite_removes_nothing_but_a_dataset(tmp_path):
    """Not, for example, a source that lies inside the dataset made from it."""
    data = tmp_path / "data"
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "workers": 1, "overwrite": True}
    prepare(write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60)), data, **options)
    (data / "text").mkdir()
    source = write_jsonl(data / "text" / "a.jsonl", make_texts(0, 60))
    with pytest.raises(UserError, match=r"data holds text, which is not part of a dataset .*; move it away$"):
        prepare(source, data, **options)
    assert os.listdir(data / "text") == ["a.jsonl"]


def test_a_dataset_in_its_own_source_is_not_read(tmp_path, caplog):
    """Its manifest is also JSON and would be taken for text."""
    for i, text in enumerate(make_texts(0, 60)):
        (tmp_path / f"{i}.txt").write_text(text)
    options = {"vocab_size": 300, "heldout_fraction": 0.3, "block_length": 64, "workers": 1, "overwrite": True}
    prepare(str(tmp_path), tmp_path / "data", **options)
    before = files(tmp_path / "data")
    with caplog.at_level("INFO", logger="jaxlinear"):
        prepare(str(tmp_path), tmp_path / "data", **options)
    assert caplog.messages == [f"{tmp_path}: leaving out the prepared datasets in it: {tmp_path / 'data'}"]
    assert files(tmp_path / "data") == before
    with pytest.raises(UserError, match=r"data is a prepared dataset, which has no text; name the source it was made"):
        prepare(str(tmp_path / "data"), tmp_path / "again", **options)
    for name in ("manifest.json", "train/a.txt", "heldout/b.txt"):  # which is not a dataset of ours
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text('{"text": "one"}')
    assert len(list(open_source(str(tmp_path / "corpus")))) == 3


def test_a_mounted_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    """The work would be in vain, since a mount cannot be renamed."""
    source, data = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60)), tmp_path / "data"
    data.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(data))
    with pytest.raises(UserError, match="data is a mount point and cannot be replaced; name a directory in it"):
        prepare(source, data, tokenizer="bytes", workers=1, heldout_fraction=0.3)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"] and os.listdir(data) == []
    prepare(source, data / "in", tokenizer="bytes", workers=1, heldout_fraction=0.3)


@pytest.mark.parametrize("there", ["dataset", "empty directory", "nothing"])
def test_output_through_a_link(tmp_path, there):
    """The dataset appears where the link points; the link stays, and nothing is left beside either."""
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60))
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "workers": 1}
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "data", tmp_path / "link"
    if there == "dataset":
        prepare(source, target, block_length=64, **options)
    elif there == "empty directory":
        target.mkdir()
    link.symlink_to(target)
    prepare(source, link, block_length=32, overwrite=there == "dataset", **options)
    assert link.is_symlink() and read_manifest(target).block_length == 32
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "disk", "link"] and os.listdir(tmp_path / "disk") == ["data"]


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60))
    monkeypatch.setattr(SplitWriter, "_shard_path", lambda self: pathlib.Path("/dev/full"))
    with pytest.raises(OSError, match="No space left on device") as raised:
        prepare(source, tmp_path / "data", tokenizer="bytes", heldout_fraction=0.3)
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch, overwrite):
    """At the last moment, when only the manifest is missing; an older dataset remains."""
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60))
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "workers": 1}
    if overwrite:
        prepare(source, tmp_path / "data", block_length=64, **options)
    before = files(tmp_path)

    def interrupt(self, directory):
        assert (directory / "train/00000.array_record").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "data", overwrite=overwrite, **options)
    assert files(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == (["a.jsonl", "data"] if overwrite else ["a.jsonl"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_older_dataset_is_back_after_an_end_between_the_renames(tmp_path, monkeypatch, error):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60))
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "workers": 1}
    prepare(source, tmp_path / "data", block_length=64, **options)
    before = files(tmp_path)
    rename = pathlib.Path.rename

    def ended(self, target):
        if ".partial-" in self.name:
            assert not (tmp_path / "data").exists()
            raise error
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", ended)
    with pytest.raises(error):
        prepare(source, tmp_path / "data", overwrite=True, **options)
    assert files(tmp_path) == before and sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"]


def test_what_another_run_made_meanwhile_stays(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(0, 60))
    options = {"tokenizer": "bytes", "heldout_fraction": 0.3, "workers": 1}
    write = Manifest.write

    def make_another(self, directory):
        monkeypatch.setattr(Manifest, "write", write)
        prepare(source, tmp_path / "data", block_length=64, **options)
        write(self, directory)

    monkeypatch.setattr(Manifest, "write", make_another)
    with pytest.raises(UserError, match="data already exists; --overwrite replaces it"):
        prepare(source, tmp_path / "data", block_length=32, **options)
    assert read_manifest(tmp_path / "data").block_length == 64
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "data"]
