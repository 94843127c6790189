"""Batches reach the devices that they belong to, whatever the order of the devices in the mesh."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlinear.launching.local import held_port
from jaxlinear.parallel import feeding
from jaxlinear.parallel import mesh as meshes

ONES = dict.fromkeys(meshes.AXES, 1)
ORDER = (5, 2, 7, 0, 3, 6, 1, 4)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "sequence": 2}, {"data": 4, "tensor": 2}])
def test_devices_in_any_order_get_their_rows(sizes):
    devices = [jax.devices()[i] for i in ORDER]
    mesh = meshes.make_mesh(ONES | sizes, devices)
    assert list(mesh.devices.flat) == devices
    batch = {"tokens": np.arange(16 * 4, dtype=np.int32).reshape(16, 4)}
    placed = feeding.place(batch, meshes.batch_sharding(mesh), 16)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for part, row in enumerate(mesh.devices.reshape(parts, mesh.shape["sequence"], -1)):
        for time, replicas in enumerate(row):
            for shard in placed.addressable_shards:
                if shard.device in replicas:
                    rows = batch["tokens"].reshape(parts, 16 // parts, mesh.shape["sequence"], -1)[part, :, time]
                    np.testing.assert_array_equal(shard.data, rows)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_a_batch_gave_is_read_after_the_next_is_under_way(count):
    seen = []

    def made():
        for i in range(count):
            seen.append(f"make {i}")
            yield i

    for i in feeding.one_behind(made()):
        seen.append(f"read {i}")
    expected = {0: [], 1: ["make 0", "read 0"], 3: ["make 0", "make 1", "read 0", "make 2", "read 1", "read 2"]}
    assert seen == expected[count]


PROCESS = """
import sys
import jax, numpy as np
from jaxlinear.parallel import feeding, mesh as meshes
address, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, process)
devices = [jax.devices()[i] for i in (0, 2, 3, 1)]
mesh = meshes.make_mesh(dict.fromkeys(meshes.AXES, 1) | {"data": 2, "fsdp": 2}, devices)
places, whole = meshes.batch_sharding(mesh), np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
own = feeding.local_rows(places, whole.shape)
placed = feeding.place({"x": whole[own]}, places, 8)["x"]
for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, whole[shard.index])
weights = np.arange(1, 9, dtype=np.int32)[:, None]
total = jax.jit(lambda x: (x * weights).sum())(placed)
assert int(total) == (whole * weights).sum()
print("rows", own)
"""


def test_two_processes_whose_rows_are_not_neighbours():
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    with held_port() as port:
        command = [sys.executable, "-c", PROCESS, f"127.0.0.1:{port}"]
        started = [
            subprocess.Popen(
                [*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for i in range(2)
        ]
        try:
            ends = [process.communicate(timeout=240) for process in started]
        finally:
            for process in started:
                process.kill()
    assert [process.returncode for process in started] == [0, 0], ends
    found = [[line for line in output.splitlines() if line.startswith("rows")] for output, _ in ends]
    assert found == [["rows [0, 1, 6, 7]"], ["rows [2, 3, 4, 5]"]]
