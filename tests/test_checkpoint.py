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


def test_round_trip(tmp_path):
    checkpoints = small_trees.save(tmp_path, (1, 2), keep_newest=2)
    assert checkpoints.steps() == [1, 2]
    small_trees.assert_equal(checkpoints.restore(small_trees.on(small_trees.single())), small_trees.trees(2))
    small_trees.assert_equal(checkpoints.restore(small_trees.on(small_trees.single()), 1), small_trees.trees(1))
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


@pytest.mark.parametrize("sees, words", [(2, "process 1 sees step 2"), (-1, "process 1 sees none")])
def test_a_host_that_never_sees_the_newest_checkpoint_is_refused(three, monkeypatch, sees, words):
    checkpoints = Checkpoints(three)
    asked = of_two_processes(monkeypatch, lambda question: sees)
    with pytest.raises(RunError, match=f"is that of step 3 for process 0, but {words}; a run can resume only when all"):
        checkpoints.newest_anywhere()
    assert len(asked) > 60  # NFS may show a stale directory for this many seconds


def test_the_first_process_is_asked_for_no_other_than_the_newest(three, monkeypatch):
    checkpoints = Checkpoints(three)
    of_two_processes(monkeypatch, lambda question: 4)
    with pytest.raises(RunError, match="is that of step 4 for process 1, but process 0 sees step 3;"):
        checkpoints.newest_anywhere()


def test_a_host_without_space_ends_all(three, monkeypatch):
    """A quota may be used up as seen by only one host."""
    checkpoints = Checkpoints(three, small_trees.config())
    with monkeypatch.context() as patch:
        of_two_processes(patch, lambda question: 1)
        with pytest.raises(EveryProcessError, match="process 1 failed; its own message says why"):
            checkpoints.save(4, small_trees.trees(4), next_batch=4)
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3]


def test_one_tree_alone(tmp_path):
    checkpoints = small_trees.save(tmp_path, (1,))
    structs = small_trees.on(small_trees.single())
    small_trees.assert_equal(
        checkpoints.restore({"parameters": structs["parameters"]}), {"parameters": small_trees.trees(1)["parameters"]}
    )


@pytest.mark.parametrize(
    "sizes, devices, spec",
    [
        ({"fsdp": 4, "tensor": 2}, 8, (None, "fsdp", "tensor")),
        ({}, 1, ()),
        ({"data": 2, "fsdp": 4}, 8, ("data", "fsdp")),
    ],
)
def test_restores_on_another_mesh(tmp_path, sizes, devices, spec):
    checkpoints = Checkpoints(tmp_path, small_trees.config())
    checkpoints.save(
        3, small_trees.placed(3, meshes.make_mesh(small_trees.ONES | {"data": 8}), (None, "data")), next_batch=3
    )
    checkpoints.wait()
    mesh = meshes.make_mesh(small_trees.ONES | sizes, jax.devices()[:devices])
    structs = small_trees.on(mesh, spec)
    restored = checkpoints.restore(structs)
    small_trees.assert_equal(restored, small_trees.trees(3))
    jax.tree.map(lambda x, struct: _check_place(x, struct.sharding), restored, structs)
    checkpoints.close()


def _check_place(x, place):
    assert x.sharding == place


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


def test_the_best_of_before_it_was_asked_for_is_kept(tmp_path):
    small_trees.save(tmp_path, range(1, 4), {1: 1.0, 2: 2.0, 3: 3.0}, keep_newest=3)
    assert small_trees.save(tmp_path, (4, 5, 6), {4: 2.5}, keep_newest=1, keep_best=1).steps() == [1, 6]


def test_a_loss_that_is_known_later_counts(tmp_path):
    """SIGTERM may end the evaluation at a step, which is then made when the run goes on."""
    options = {"keep_newest": 1, "keep_best": 1}
    small_trees.save(tmp_path, (1, 2), {1: 2.0}, **options)
    checkpoints = Checkpoints(tmp_path, small_trees.config(**options))
    checkpoints.evaluated(2, 1.0, "")
    checkpoints.save(3, small_trees.placed(3, small_trees.single()), next_batch=30, heldout_loss=1.5)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert small_trees.save(tmp_path, (4,), **options).steps() == [2, 4]


def test_losses_of_other_text_are_neither_better_nor_worse(tmp_path):
    """For example, of more text, when a run resumes with another evaluation.batches."""
    options = {"keep_newest": 1, "keep_best": 1}
    assert small_trees.save(tmp_path, (1, 2, 3), {1: 1.0, 2: 2.0}, text="a", **options).steps() == [1, 3]
    assert small_trees.save(tmp_path, (4, 5, 6), {4: 2.5, 5: 3.0}, text="b", **options).steps() == [1, 4, 6]


def test_of_losses_that_are_no_numbers_none_is_the_best(tmp_path):
    losses = {1: float("nan"), 2: 2.0, 3: float("nan"), 4: 3.0}
    assert small_trees.save(tmp_path, range(1, 6), losses, keep_newest=1, keep_best=1).steps() == [2, 5]


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
    for structs, what in ((more, "no layers.1.kernel"), (less, "a norm.scale")):
        with pytest.raises(UserError) as refusal:
            checkpoints.restore(structs)
        assert str(refusal.value) == (
            f"the checkpoint {tmp_path}/checkpoints/2 is of another version of jaxlinear: among its parameters is {what}; "
            "read it with the version that wrote it"
        )
    kernel = wider["parameters"]["layers"][0]["kernel"]
    wider["parameters"]["layers"][0]["kernel"] = jax.ShapeDtypeStruct(
        (3, 64, 128), kernel.dtype, sharding=kernel.sharding
    )
    with pytest.raises(UserError, match=rf"the checkpoint {tmp_path}/checkpoints/2 cannot be read"):
        checkpoints.restore(wider)


def test_the_checksum_of_an_array():
    """It changes with any bit, anywhere, and when two entries swap places."""
    from jaxlinear.checkpoint import _checksums

    values = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    values[0, 0, :2] = 0.0
    found, places = {_checksums({"x": values})["x"]}, list(np.ndindex(values.shape))
    for place in places:
        for bit in (0, 13, 31):
            other = values.copy()
            other.view(np.uint32)[place] ^= np.uint32(1 << bit)
            found.add(_checksums({"x": other})["x"])
    for first, second in itertools.pairwise(places[1:]):
        other = values.copy()
        other[first], other[second] = values[second], values[first]
        found.add(_checksums({"x": other})["x"])
    assert len(found) == 1 + 3 * len(places) + len(places) - 2
    mixed = {"a": jnp.array([True, False]), "b": jnp.bfloat16(1.5), "c": jnp.zeros((0, 3))}
    assert list(_checksums(mixed)) == ["a", "b", "c"] and _checksums(mixed)["c"] == 0


def test_a_full_disk_is_seen_before_anything_is_begun(three, monkeypatch):
    """While the previous checkpoint is whole."""
    checkpoints = Checkpoints(three, small_trees.config(keep_newest=9))
    checkpoints.save(4, small_trees.placed(4, small_trees.single()), next_batch=4)
    usage = shutil.disk_usage(three)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"no space .* \(it needs up to [\d.]+ MB and 0.1 MB are free\); .* of step 4"):
        checkpoints.save(5, small_trees.placed(5, small_trees.single()), next_batch=5)
    checkpoints.close()
    assert Checkpoints(three).steps() == [1, 2, 3, 4]
    small_trees.assert_equal(Checkpoints(three).restore(small_trees.on(small_trees.single())), small_trees.trees(4))


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
    checkpoints.save(4, small_trees.placed(4, small_trees.single()), next_batch=4)
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
