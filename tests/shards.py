"""Meshes of 8 devices that spread time, and documents that test the boundaries of shards."""

import numpy as np

from jaxlinear.parallel import mesh as meshes

T = 32  # shards of 4, 8 or 16 tokens
EIGHT, FOUR, TWO = {"sequence": 8}, {"data": 2, "sequence": 4}, {"fsdp": 2, "sequence": 2, "tensor": 2}
MESHES = [EIGHT, FOUR, TWO]
# [4, T]: documents that begin before, on and after the borders of shards; longer than two shards; of one token; and an id
# that is used twice.
IDS = np.stack(
    [
        np.repeat([0, 1, 2, 3], [3, 5, 20, 4]),
        np.repeat([0, 1, 2], [8, 8, 16]),
        np.arange(T),
        np.repeat([7, 8, 7], [1, 30, 1]),
    ]
).astype(np.int32)


def make_mesh(sizes):
    """A mesh over as many devices as these sizes take; the other axes are 1."""
    return meshes.make_mesh({axis: sizes.get(axis, 1) for axis in meshes.AXES})
