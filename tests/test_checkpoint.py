"""Checkpoints of small trees: what is kept, what is refused, and that arrays are restored on any mesh."""

import errno
import itertools
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from orbax.checkpoint._src.serialization import serialization

from jaxlinear import checkpoint
from jaxlinear import config as configs
from jaxlinear.checkpoint import DIRECTORY, Checkpoints
from jaxlinear.errors import EveryProcessError, RunError, UserError
from jaxlinear.parallel import distributed
from jaxlinear.parallel import mesh as meshes
from tests import small_trees


@pytest.fixture
def three(tmp_path, tmp_path_factory):
    """A work directory with steps 1, 2 and 3."""
    return shutil.copytree(small_trees.three(tmp_path_factory.getbasetemp() / "three"), tmp_path / "run")


def assert_restored(checkpoints, step):
    """Asserts that the newest trees, and those of that step, are those that were saved in it."""
    for asked in (None, step):
        found = checkpoints.restore(small_trees.on(small_trees.single()), asked)
        small_trees.assert_equal(found, small_trees.trees(step))


def put(checkpoints, step, **heldout):
    checkpoints.save(step, small_trees.placed(step, small_trees.single()), next_batch=10 * step, **heldout)


def test_round_trip(tmp_path):
    checkpoints = small_trees.save(tmp_path, (1, 2), keep_newest=2)
    assert checkpoints.steps() == [1, 2]
    structs = small_trees.on(small_trees.single())
    assert_restored(checkpoints, 2)
    small_trees.assert_equal(checkpoints.restore(structs, 1), small_trees.trees(1))
    one = {"parameters": structs["parameters"]}  # one tree alone
    small_trees.assert_equal(checkpoints.restore(one), {"parameters": small_trees.trees(2)["parameters"]})
    assert checkpoints.meta()["next_batch"] == 20 and checkpoints.meta(1)["next_batch"] == 10
    assert checkpoints.meta()["config"] == json.loads(configs.to_json(small_trees.config(keep_newest=2)))


def test_a_checkpoint_that_is_removed_while_they_are_listed(three, monkeypatch):
    """Orbax reads the time of each checkpoint it has listed; meanwhile, the run that owns the directory removes one."""
    manager, opened = checkpoint._Manager, []

    def removed_meanwhile(directory, options):
        opened.append(options.read_only)
        if len(opened) < 3:
            gone = three / DIRECTORY / "1"
            shutil.rmtree(gone, ignore_errors=True)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(gone))
        return manager(directory, options=options)

    monkeypatch.setattr(checkpoint, "_Manager", removed_meanwhile)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    assert Checkpoints(three).steps() == [2, 3] and opened == [True] * 3


def of_two_processes(monkeypatch, other):
    """Makes this process the first of two. The other answers every number with ``other(count of questions so far)``."""
    asked = []

    def gathered(*numbers):
        asked.append(numbers)
        return np.array([numbers, [other(len(asked))]], np.int32)

    monkeypatch.setattr(distributed, "_gathered", gathered)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    return asked


def test_a_host_that_sees_the_newest_checkpoint_late_is_waited_for(three, monkeypatch):
    checkpoints = Checkpoints(three)
    asked = of_two_processes(monkeypatch, lambda question: 2 if question < 20 else 3)
    assert checkpoints.newest_anywhere() == 3 and len(asked) == 20


@pytest.mark.parametrize(
    "sees, message",
    [
        (2, "step 3 for process 0, but process 1 sees step 2; a run can resume only when all"),
        (-1, "step 3 for process 0, but process 1 sees none; a run can resume only when all"),
        (4, "step 4 for process 1, but process 0 sees step 3;"),
    ],
)
def test_a_host_that_never_sees_the_newest_checkpoint_is_refused(three, monkeypatch, sees, message):
    checkpoints = Checkpoints(three)
    asked = of_two_processes(monkeypatch, lambda question: sees)
    with pytest.raises(RunError, match=f"is that of {message}"):
        checkpoints.newest_anywhere()
    assert len(asked) > 60  # NFS may show a stale directory for this many seconds


def test_a_host_without_space_ends_all(three, monkeypatch):
    """A quota may be used up as seen by only one host."""
    checkpoints = Checkpoints(three, small_trees.config())
    with monkeypatch.context() as patch:
        of_two_processes(patch, lambda question: 1)
        with pytest.raises(EveryProcessError, match="process 1 failed; its own message says why"):
            checkpoints.save(4, small_trees.trees(4), next_batch=4)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3]


@pytest.mark.parametrize(
    "sizes, devices, spec",
    [
        ({"fsdp": 4, "tensor": 2}, 8, (None, "fsdp", "tensor")),
        ({}, 1, ()),
        ({"data": 2, "fsdp": 4}, 8, ("data", "fsdp")),
    ],
)
def test_restores_on_another_mesh(tmp_path, sizes, devices, spec):
    checkpoints, whole = Checkpoints(tmp_path, small_trees.config()), meshes.make_mesh(small_trees.ONES | {"data": 8})
    checkpoints.save(3, small_trees.placed(3, whole, (None, "data")), next_batch=3)
    checkpoints.wait()
    structs = small_trees.on(meshes.make_mesh(small_trees.ONES | sizes, jax.devices()[:devices]), spec)
    restored = checkpoints.restore(structs)
    small_trees.assert_equal(restored, small_trees.trees(3))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda struct: struct.sharding, structs)
    checkpoints.close()


@pytest.mark.parametrize(
    "options, kept, then",
    [
        ({"keep_newest": 1}, [9], [10]),
        ({"keep_newest": 3}, [7, 8, 9], [8, 9, 10]),
        ({"keep_newest": 1, "keep_every_steps": 4}, [4, 8, 9], [4, 8, 10]),
        ({"keep_newest": 2, "keep_best": 2}, [3, 5, 8, 9], [3, 5, 9, 10]),
        ({"keep_newest": 1, "keep_best": 1, "keep_every_steps": 6}, [3, 6, 9], [3, 6, 10]),
    ],
)
def test_what_is_kept(tmp_path, options, kept, then):
    """Odd steps have held-out losses, the lowest at 3 and 5."""
    losses = {1: 4.0, 3: 1.0, 5: 2.0, 7: 3.0, 9: 3.5}
    assert small_trees.save(tmp_path, range(1, 10), losses, **options).steps() == kept
    # When the run resumes, checkpoints are kept for the same reasons.
    assert small_trees.save(tmp_path, (10,), **options).steps() == then


BEST = {"keep_newest": 1, "keep_best": 1}


@pytest.mark.parametrize(
    "starts",
    [
        # The best of before it was asked for.
        [(range(1, 4), {1: 1.0, 2: 2.0, 3: 3.0}, {"keep_newest": 3}, [1, 2, 3]), ((4, 5, 6), {4: 2.5}, BEST, [1, 6])],
        # Losses of other text, for example of more of it, are neither better nor worse.
        [
            ((1, 2, 3), {1: 1.0, 2: 2.0}, {"text": "a", **BEST}, [1, 3]),
            ((4, 5, 6), {4: 2.5, 5: 3.0}, {"text": "b", **BEST}, [1, 4, 6]),
        ],
        # Of losses that are no numbers none is the best.
        [(range(1, 6), {1: float("nan"), 2: 2.0, 3: float("nan"), 4: 3.0}, BEST, [2, 5])],
    ],
    ids=["from before", "other text", "no numbers"],
)
def test_which_is_the_best(tmp_path, starts):
    for steps, losses, options, kept in starts:
        assert small_trees.save(tmp_path, steps, losses, **options).steps() == kept


def test_a_loss_that_is_known_later_counts(tmp_path):
    """SIGTERM may end the evaluation at a step, which is then made when the run goes on."""
    small_trees.save(tmp_path, (1, 2), {1: 2.0}, **BEST)
    checkpoints = Checkpoints(tmp_path, small_trees.config(**BEST))
    checkpoints.evaluated(2, 1.0, "")
    put(checkpoints, 3, heldout_loss=1.5)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert small_trees.save(tmp_path, (4,), **BEST).steps() == [2, 4]


def test_a_step_that_is_not_there(tmp_path):
    checkpoints = small_trees.save(tmp_path, (1, 2))
    with pytest.raises(UserError, match=rf"{tmp_path}/checkpoints has no checkpoint of step 7; it has 1, 2$"):
        checkpoints.restore(small_trees.on(small_trees.single()), 7)
    with pytest.raises(UserError, match=r"empty/checkpoints has no completed checkpoint"):
        small_trees.save(tmp_path / "empty", ()).meta()
    with pytest.raises(UserError, match=r"nothing has no checkpoints: it is not the work directory of a run"):
        Checkpoints(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_another_tree_is_refused(tmp_path):
    """It is not damaged, and the message does not advise removing it."""
    checkpoints = small_trees.save(tmp_path, (1, 2))
    more, less, wider = (small_trees.on(small_trees.single()) for _ in range(3))
    more["parameters"]["layers"][1] = more["parameters"]["layers"][0]
    del less["parameters"]["norm"]
    wide = wider["parameters"]["layers"][0]
    wide["kernel"] = wide["kernel"].update(shape=(3, 64, 128))
    for structs, message in (
        (more, r" is of another version .*: among its parameters is no layers.1.kernel; .* the version that wrote it$"),
        (less, r" is of another version .*: among its parameters is a norm.scale; .* the version that wrote it$"),
        (wider, " cannot be read"),
    ):
        with pytest.raises(UserError, match=f"^the checkpoint {tmp_path}/checkpoints/2{message}"):
            checkpoints.restore(structs)


def test_the_checksum_of_an_array():
    """It changes with any bit, anywhere, and when two entries swap places."""
    values = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    values[0, 0, :2] = 0.0
    places, others = list(np.ndindex(values.shape)), [values]
    for place, bit in itertools.product(places, (0, 13, 31)):
        others.append(values.copy())
        others[-1].view(np.uint32)[place] ^= np.uint32(1 << bit)
    for first, second in itertools.pairwise(places[1:]):
        others.append(values.copy())
        others[-1][first], others[-1][second] = values[second], values[first]
    assert len({checkpoint._checksums({"x": x})["x"] for x in others}) == 1 + 3 * len(places) + len(places) - 2
    mixed = {"a": jnp.array([True, False]), "b": jnp.bfloat16(1.5), "c": jnp.zeros((0, 3))}
    found = checkpoint._checksums(mixed)
    assert list(found) == ["a", "b", "c"] and found["c"] == 0


def test_a_full_disk_is_seen_before_anything_is_begun(three, monkeypatch):
    """While the previous checkpoint is whole."""
    checkpoints = Checkpoints(three, small_trees.config(keep_newest=9))
    put(checkpoints, 4)
    usage = shutil.disk_usage(three)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"no space .* \(it needs up to [\d.]+ MB and 0.1 MB are free\); .* of step 4"):
        put(checkpoints, 5)
    checkpoints.close()
    assert Checkpoints(three).steps() == [1, 2, 3, 4]
    assert_restored(Checkpoints(three), 4)


def test_an_error_of_a_background_write_is_raised(three, monkeypatch):
    checkpoints = Checkpoints(three, small_trees.config(keep_newest=9))
    shutil.copytree(three / DIRECTORY / "3", three / DIRECTORY / "4.orbax-checkpoint-tmp")

    def fail():
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(UserError, match=r"no space left on the disk for a checkpoint in .* the newest .* of step 3;"):
        checkpoints.wait()
    checkpoints.close()  # does not raise again
    assert not (three / DIRECTORY / "4.orbax-checkpoint-tmp").exists()

    checkpoints = Checkpoints(three, small_trees.config(keep_newest=9))
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # any other error is a defect
        checkpoints.close()


def test_an_error_of_a_background_write_is_known_before_the_next_save(three, monkeypatch, capfd, caplog):
    """As the system's error, which the programs explain, and without the tracebacks of Orbax and its event loop."""
    checkpoints = Checkpoints(three, small_trees.config(keep_newest=9))
    checkpoints.check()

    async def fail(*_, **__):
        raise ValueError("INTERNAL: Failed to write 16456 bytes to file 29: Input/output error [os_error_code='5']")

    monkeypatch.setattr(serialization, "async_serialize_from_host", fail)
    put(checkpoints, 4)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: '.*/checkpoints'$"):
        for _ in range(3000):  # a minute
            checkpoints.check()
            time.sleep(0.02)
    checkpoints.close()  # does not raise again
    assert Checkpoints(three).steps() == [1, 2, 3]
    assert "Traceback" not in capfd.readouterr().err
    (message,) = caplog.messages
    assert message.startswith("a checkpoint could not be written: INTERNAL: Failed to write 16456 bytes")


def test_jax_is_not_asked_about_preemption_by_step(three, monkeypatch):
    """It counts all questions together, and a run asks more often than once a step, or less."""
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: pytest.fail(f"asked of {step}"))
    assert Checkpoints(three)._manager.reached_preemption(1000) is False
