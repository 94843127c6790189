"""Small trees to save and restore, and a directory with checkpoints of them."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear import config as configs
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.parallel import mesh as meshes

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
    """Where to restore the trees: every wide array sharded by ``spec``, the others replicated."""

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


def save(workdir, steps, heldout=None, text="", **changes):
    checkpoints = Checkpoints(workdir, config(**changes))
    for step in steps:
        loss = None if heldout is None else heldout.get(step)
        checkpoints.save(step, placed(step, single()), next_batch=10 * step, heldout_loss=loss, heldout_text=text)
    checkpoints.close()
    return Checkpoints(workdir)


def assert_equal(actual, expected):
    paths, structure = jax.tree.flatten_with_path(expected)
    leaves, actual_structure = jax.tree.flatten(actual)
    assert actual_structure == structure and leaves
    for (path, want), got in zip(paths, leaves, strict=True):
        assert got.dtype == want.dtype, path
        np.testing.assert_array_equal(got, want, err_msg=str(path))


@functools.cache
def three(directory):
    """``directory`` with steps 1, 2 and 3. Copy it; do not change it."""
    save(directory, (1, 2, 3), keep_newest=3)
    return directory
