"""Checkpoints of small trees: what is kept, what is refused, and that arrays come back on any mesh."""

import functools
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear import config as configs
from jaxlinear.checkpoint import DIRECTORY, Checkpoints
from jaxlinear.errors import UserError
from jaxlinear.parallel import mesh as meshes

# Orbax leaves coroutines behind when a file is damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ONES = dict.fromkeys(meshes.AXES, 1)


def trees(seed):
    """Named trees with nested dicts, a tuple, a scalar, and an entry that has no array."""
    random = np.random.default_rng(seed)
    wide = random.standard_normal((2, 64, 128)).astype(np.float32)
    return {
        "parameters": {"layers": {0: {"kernel": wide}}, "norm": {"scale": wide[0, 0, :8].copy()}},
        "training": {
            "step": np.int32(seed),
            "moments": ({"kernel": wide**2}, None),
            "key": np.arange(2, dtype=np.uint32),
        },
    }


def on(mesh, spec=()):
    """Where to restore the trees: every wide array by ``spec``, the others everywhere."""

    def struct(x):
        place = NamedSharding(mesh, PartitionSpec(*spec) if x.ndim == 3 else PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(struct, trees(0))


def single():
    return meshes.make_mesh(ONES, jax.devices()[:1])


def placed(seed, mesh, spec=()):
    return jax.tree.map(lambda x, struct: jax.device_put(x, struct.sharding), trees(seed), on(mesh, spec))


def config(**changes):
    made = configs.default()
    made.checkpoint.update(changes)
    return made


def save(workdir, steps, heldout=None, **changes):
    checkpoints = Checkpoints(workdir, config(**changes))
    for step in steps:
        loss = None if heldout is None else heldout.get(step)
        checkpoints.save(step, placed(step, single()), next_batch=10 * step, heldout_loss=loss)
    checkpoints.close()
    return Checkpoints(workdir)


def assert_equal(actual, expected):
    paths, structure = jax.tree.flatten_with_path(expected)
    leaves, actual_structure = jax.tree.flatten(actual)
    assert actual_structure == structure and leaves
    for (path, want), got in zip(paths, leaves, strict=True):
        assert got.dtype == want.dtype, path
        np.testing.assert_array_equal(got, want, err_msg=str(path))


def test_round_trip(tmp_path):
    checkpoints = save(tmp_path, (1, 2), keep_newest=2)
    assert checkpoints.steps() == [1, 2]
    assert_equal(checkpoints.restore(on(single())), trees(2))
    assert_equal(checkpoints.restore(on(single()), 1), trees(1))
    assert checkpoints.meta()["next_batch"] == 20 and checkpoints.meta(1)["next_batch"] == 10
    assert checkpoints.meta()["config"] == json.loads(configs.to_json(config(keep_newest=2)))


def test_one_tree_alone(tmp_path):
    checkpoints = save(tmp_path, (1,))
    structs = on(single())
    assert_equal(checkpoints.restore({"parameters": structs["parameters"]}), {"parameters": trees(1)["parameters"]})


@pytest.mark.parametrize(
    "sizes, devices, spec",
    [
        ({"fsdp": 4, "tensor": 2}, 8, (None, "fsdp", "tensor")),
        ({}, 1, ()),
        ({"data": 2, "fsdp": 4}, 8, ("data", "fsdp")),
    ],
)
def test_restores_on_another_mesh(tmp_path, sizes, devices, spec):
    checkpoints = Checkpoints(tmp_path, config())
    checkpoints.save(3, placed(3, meshes.make_mesh(ONES | {"data": 8}), (None, "data")), next_batch=3)
    checkpoints.wait()
    mesh = meshes.make_mesh(ONES | sizes, jax.devices()[:devices])
    structs = on(mesh, spec)
    restored = checkpoints.restore(structs)
    assert_equal(restored, trees(3))
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
    """Held-out losses are there at odd steps, and the lowest at 3 and 5."""
    losses = {1: 4.0, 3: 1.0, 5: 2.0, 7: 3.0, 9: 3.5}
    assert save(tmp_path, range(1, 10), losses, **options).steps() == kept
    # When the run goes on, it is for the same reasons.
    assert save(tmp_path, (10,), **options).steps() == then


def test_a_step_that_is_not_there(tmp_path):
    checkpoints = save(tmp_path, (1, 2))
    with pytest.raises(UserError, match=rf"{tmp_path}/checkpoints has no checkpoint of step 7; it has 1, 2$"):
        checkpoints.restore(on(single()), 7)
    with pytest.raises(UserError, match=r"empty/checkpoints holds no checkpoint that was completed"):
        save(tmp_path / "empty", ()).meta()
    with pytest.raises(UserError, match=r"nothing has no checkpoints: it is not the work directory of a run"):
        Checkpoints(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_another_tree_is_refused(tmp_path):
    checkpoints = save(tmp_path, (1, 2))
    structs = on(single())
    structs["parameters"]["layers"][1] = structs["parameters"]["layers"][0]
    with pytest.raises(UserError, match=rf"the checkpoint {tmp_path}/checkpoints/2 cannot be read"):
        checkpoints.restore(structs)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def remove(file):
    file.unlink()


@functools.cache
def saved(directory):
    save(directory, (1, 2, 3), keep_newest=3)
    return directory


@pytest.fixture
def three(tmp_path, tmp_path_factory):
    """A work directory with the steps 1, 2 and 3, to be damaged."""
    origin = saved(tmp_path_factory.getbasetemp() / "three")
    return shutil.copytree(origin, tmp_path / "run")


def contents(step, item):
    """The file with the largest array of an item."""
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
@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty, remove])
def test_damage_is_refused_by_name(three, what, damage):
    if (what, damage) == ("tree", remove):
        pytest.skip("Orbax finds the tree without its description, and the checksums are those that were saved")
    damage(DAMAGED[what](three / DIRECTORY / "3"))
    before = files(three)
    for checkpoints in (Checkpoints(three), Checkpoints(three, config(keep_newest=3))):
        with pytest.raises(UserError) as refusal:
            checkpoints.restore(on(single()))
        message = str(refusal.value)
        assert message.startswith(f"the checkpoint {three}/checkpoints/3 cannot be read (")
        assert message.endswith("); remove it to go on from step 2") and "\n" not in message
        assert_equal(checkpoints.restore(on(single()), 2), trees(2))
    assert files(three) == before


def files(directory):
    return {path: path.read_bytes() for path in pathlib.Path(directory).rglob("*") if path.is_file()}


def test_the_checksum_of_an_array():
    """Whichever bit changes, and wherever it lies, it is another one; so it is if two entries change places."""
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


def test_a_half_written_checkpoint_is_not_seen(three):
    """As Orbax names what it has not finished; the next save removes it."""
    directory = three / DIRECTORY
    shutil.copytree(directory / "3", directory / "9.orbax-checkpoint-tmp")
    remove(directory / "9.orbax-checkpoint-tmp" / "commit_success.txt")
    remove(contents(directory / "9.orbax-checkpoint-tmp", "parameters"))
    reader = Checkpoints(three)
    assert reader.steps() == [1, 2, 3]
    assert_equal(reader.restore(on(single())), trees(3))
    assert (directory / "9.orbax-checkpoint-tmp").exists()
    writer = Checkpoints(three, config(keep_newest=3))
    assert writer.steps() == [1, 2, 3]
    writer.save(4, placed(4, single()), next_batch=4)
    writer.close()
    assert writer.steps() == [2, 3, 4] and not (directory / "9.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize("left", [(), ("meta",), ("meta", "parameters")])
def test_a_step_without_all_its_parts_is_refused(three, left):
    directory = three / DIRECTORY
    (directory / "9").mkdir()
    for item in left:
        shutil.copytree(directory / "3" / item, directory / "9" / item)
    checkpoints = Checkpoints(three, config(keep_newest=3))
    with pytest.raises(UserError, match=rf"{directory}/9 cannot be read .*; remove it to go on from step 3$"):
        checkpoints.restore(on(single()))
