"""Damaged or half-written checkpoints: none is mistaken for another, and none is silently ignored."""

import gc
import pathlib
import shutil
import sys
import types

import pytest

from jaxlinear.checkpoint import DIRECTORY, Checkpoints
from jaxlinear.errors import UserError
from tests import small_trees

# Orbax leaves coroutines unawaited when a file is damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _collect():
    yield
    gc.collect()  # while the filter is active


@pytest.fixture
def three(tmp_path, tmp_path_factory):
    """A work directory with steps 1, 2 and 3, to be damaged."""
    return shutil.copytree(small_trees.three(tmp_path_factory.getbasetemp() / "three"), tmp_path / "run")


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def restore(checkpoints, step=None):
    return checkpoints.restore(small_trees.on(small_trees.single()), step)


def contents(step, item):
    """The file that holds an item's largest array."""
    return max((step / item).glob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)


DAMAGED = {
    "parameters": lambda step: contents(step, "parameters"),
    "training": lambda step: contents(step, "training"),
    "index": lambda step: next((step / "training" / "d").iterdir()),
    "manifest": lambda step: step / "parameters" / "manifest.ocdbt",
    "tree": lambda step: step / "parameters" / "_METADATA",
    "meta": lambda step: step / "meta" / "metadata",
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty, pathlib.Path.unlink])
def test_damage_is_refused_by_name(three, what, damage):
    if (what, damage) == ("tree", pathlib.Path.unlink):
        pytest.skip("Orbax finds the tree without its description, and the checksums are those that were saved")
    damage(DAMAGED[what](three / DIRECTORY / "3"))
    before = _files(three)
    message = rf"^the checkpoint {three}/checkpoints/3 cannot be read \([^\n]*\); remove it to resume from step 2$"
    for checkpoints in (Checkpoints(three), Checkpoints(three, small_trees.config(keep_newest=3))):
        with pytest.raises(UserError, match=message):
            restore(checkpoints)
        small_trees.assert_equal(restore(checkpoints, 2), small_trees.trees(2))
    assert _files(three) == before


def test_answers_after_a_refusal_are_not_printed(three, monkeypatch):
    """TensorStore's threads may still answer when Orbax no longer listens."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    late, other = (types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
    checkpoints = Checkpoints(three)
    restore(checkpoints)
    sys.unraisablehook(late)
    assert heard == ["Event loop is closed"]
    DAMAGED["index"](three / DIRECTORY / "3").unlink()
    with pytest.raises(UserError):
        restore(checkpoints)
    del heard[:]
    for unraisable in (late, other):
        sys.unraisablehook(unraisable)
    assert heard == ["other"]


@pytest.mark.parametrize("damage", [truncate, empty])
def test_damaged_losses_are_refused_by_name(tmp_path, damage):
    """Orbax reads the losses of all checkpoints, whichever one is asked for."""
    small_trees.save(tmp_path, (1, 2), heldout={1: 2.0, 2: 3.0}, keep_newest=2, keep_best=1)
    damage(tmp_path / DIRECTORY / "1" / "metrics" / "metrics")
    message = (
        rf"^the checkpoint {tmp_path}/checkpoints/1 cannot be read \(its losses .*\); remove it to make the others"
    )
    for config in (None, small_trees.config(keep_newest=2, keep_best=1)):
        with pytest.raises(UserError, match=message):
            Checkpoints(tmp_path, config)
    shutil.rmtree(tmp_path / DIRECTORY / "1")
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_half_written_checkpoint_is_not_seen(three):
    """It has the name that Orbax gives to unfinished checkpoints; the next save removes it."""
    directory = three / DIRECTORY
    shutil.copytree(directory / "3", directory / "9.orbax-checkpoint-tmp")
    (directory / "9.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    contents(directory / "9.orbax-checkpoint-tmp", "parameters").unlink()
    reader = Checkpoints(three)
    assert reader.steps() == [1, 2, 3]
    small_trees.assert_equal(restore(reader), small_trees.trees(3))
    assert (directory / "9.orbax-checkpoint-tmp").exists()
    writer = Checkpoints(three, small_trees.config(keep_newest=3))
    assert writer.steps() == [1, 2, 3]
    writer.save(4, small_trees.placed(4, small_trees.single()), next_batch=4)
    writer.close()
    assert writer.steps() == [2, 3, 4] and not (directory / "9.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize("left", [(), ("meta",), ("meta", "parameters")])
def test_a_step_without_all_its_parts_is_refused(three, left):
    directory = three / DIRECTORY
    (directory / "9").mkdir()
    for item in left:
        shutil.copytree(directory / "3" / item, directory / "9" / item)
    checkpoints = Checkpoints(three, small_trees.config(keep_newest=3))
    with pytest.raises(UserError, match=rf"{directory}/9 cannot be read .*; remove it to resume from step 3$"):
        restore(checkpoints)


def _files(directory):
    return {path: path.read_bytes() for path in pathlib.Path(directory).rglob("*") if path.is_file()}
