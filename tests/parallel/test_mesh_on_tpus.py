"""Where devices lie in a mesh, from descriptions without chips: along the torus of a TPU slice, and slices along
``data``."""

import functools
import logging

import numpy as np
import pytest

from jaxlinear.costs import targets
from jaxlinear.errors import UserError
from jaxlinear.parallel import feeding
from jaxlinear.parallel import mesh as meshes

ONES = dict.fromkeys(meshes.AXES, 1)


def mesh_of(target, **sizes):
    return meshes.make_mesh(ONES | sizes, targets.find(target).devices)


@functools.cache
def two_slices():
    return targets.find("2xv5e:4x4").devices


def rows(mesh, axis):
    """``[rows, size of the axis, 3]``: the places on the torus of the devices that differ only in this axis."""
    coordinates = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    at = meshes.AXES.index(axis)
    return np.moveaxis(coordinates, at, -2).reshape(-1, mesh.shape[axis], 3)


def varying(mesh, axis):
    """The indices of the coordinates in which these rows vary."""
    return set((np.ptp(rows(mesh, axis), axis=1) > 0).sum(axis=1).tolist())


def assert_neighbours(mesh, axis, around):
    """Each device of a row is one link from the next, and the last from the first, on torus axes of ``around`` chips."""
    found = rows(mesh, axis)
    steps = np.abs(np.roll(found, -1, axis=1) - found)
    assert np.minimum(steps, around - steps).sum(axis=2).tolist() == [[1] * found.shape[1]] * len(found)


def assert_each_once(mesh, devices):
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in devices)


@pytest.mark.parametrize(
    "target, around, sizes, dimensions",
    [
        ("v5p:4x4x4", 4, {"data": 16, "sequence": 4}, {"data": 2, "sequence": 1}),
        ("v6e:16x16", 16, {"data": 16, "fsdp": 16}, {"data": 1, "fsdp": 1}),
        ("v6e:16x16", 16, {"fsdp": 16, "sequence": 16}, {"fsdp": 1, "sequence": 1}),
        ("v5p:4x4x4", 4, {"data": 4, "fsdp": 4, "sequence": 4}, {"data": 1, "fsdp": 1, "sequence": 1}),
    ],
)
def test_axes_are_lines_of_the_torus_or_planes(target, around, sizes, dimensions):
    mesh = mesh_of(target, **sizes)
    assert {axis: varying(mesh, axis) for axis in sizes} == {axis: {count} for axis, count in dimensions.items()}
    for axis in (axis for axis, count in dimensions.items() if count == 1):
        assert_neighbours(mesh, axis, around)
    assert_each_once(mesh, targets.find(target).devices)


def test_an_axis_of_the_torus_can_be_split(caplog):
    meshes._warn.cache_clear()
    mesh = mesh_of("v5p:4x4x4", data=2, fsdp=32)
    assert_each_once(mesh, targets.find("v5p:4x4x4").devices)
    assert varying(mesh, "data") == {1} and not caplog.records


def test_a_tray_is_one_ring_or_in_the_order_of_its_hosts():
    devices = targets.find("v5e:2x4").devices
    assert list(meshes.make_mesh(ONES | {"data": 2, "fsdp": 4}, devices).devices.flat) == list(devices)
    ring = meshes.make_mesh(ONES | {"sequence": 8}, devices)
    assert list(ring.devices.flat) != list(devices)
    assert_each_once(ring, devices)


def test_devices_without_a_place_on_the_torus_stay_in_order_with_one_warning(caplog):
    meshes._warn.cache_clear()
    devices = targets.find("v5e:4x4").devices[:9]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert list(meshes.make_mesh(ONES | {"data": 3, "fsdp": 3}, devices).devices.flat) == list(devices)
    (record,) = caplog.records
    assert record.message.startswith("JAX cannot place a mesh of data 3 x fsdp 3 on the torus: ")
    assert "devices are taken in their given order" in record.message and "\n" not in record.message


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 16}, {"data": 4, "sequence": 8}, {"data": 32}])
def test_slices_are_laid_along_data(sizes):
    mesh = meshes.make_mesh(ONES | sizes, two_slices())
    assert_each_once(mesh, two_slices())
    half = sizes["data"] // 2
    for index, part in enumerate((mesh.devices[:half], mesh.devices[half:])):
        assert {device.slice_index for device in part.flat} == {index}
    within = [np.array([device.coords for device in part.flat]) for part in (mesh.devices[:half], mesh.devices[half:])]
    np.testing.assert_array_equal(*within)


@pytest.mark.parametrize(
    "sizes, count, message",
    [
        (
            {"fsdp": -1},
            32,
            "^mesh.data=1 is not a multiple of the 2 slices, .* works is mesh.data=2, .* over 16 devices in total$",
        ),
        ({"fsdp": 2, "tensor": 16}, 32, "^mesh.data=1 is not a multiple of the 2 slices, "),
        ({"sequence": 32}, 32, "^mesh.data=1 is not a multiple of the 2 slices, "),
        ({"data": 24}, 24, "^the 2 slices have 16, 8 devices; a mesh needs the same number from each"),
    ],
)
def test_no_axis_but_data_goes_from_slice_to_slice(sizes, count, message):
    """And slices are of one size."""
    with pytest.raises(UserError, match=message):
        meshes.make_mesh(ONES | sizes, two_slices()[:count])


@pytest.mark.parametrize(
    "target, sizes, batch, most",
    [
        ("v5p:4x4x4", {"data": 16, "fsdp": 4}, 64, 4),
        ("v6e:16x16", {"data": 16, "fsdp": 16}, 256, 4),
        ("v6e:16x16", {"data": 16, "fsdp": 16}, 512, 8),
        ("v5p:4x4x4", {"data": 16, "sequence": 4}, 32, 4),
    ],
)
def test_a_host_reads_no_row_but_those_of_its_devices(target, sizes, batch, most):
    mesh = mesh_of(target, **sizes)
    places = meshes.batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    by_row = mesh.devices.reshape(parts, -1)  # the devices of each part of the batch
    read = {process: feeding.local_rows(places, (batch, 2048), process) for process in range(mesh.size // 4)}
    for process, got in read.items():
        own = [part for part in range(parts) if process in {device.process_index for device in by_row[part]}]
        each = batch // parts
        assert got == [row for part in own for row in range(part * each, (part + 1) * each)]
        assert len(got) == most
    assert any(max(got) - min(got) >= len(got) for got in read.values())  # otherwise all rows would be adjacent
    assert sorted(set().union(*read.values())) == list(range(batch))
