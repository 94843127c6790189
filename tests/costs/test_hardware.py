"""The peak of a device: from the table, or measured."""

import types

import jax
import pytest

from jaxlinear.costs import hardware


def test_a_cpu_is_measured_once_and_shared_by_its_devices():
    devices = jax.devices()
    peaks = [hardware.peak_flops(device) for device in devices]
    assert len(devices) == 8 and len(set(peaks)) == 1
    assert 1e8 < sum(peaks) < 1e15


@pytest.mark.parametrize(
    "kind, peak",
    [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v4", 275e12), ("TPU v5e", 197e12), ("an abacus", None)],
)
def test_a_device_by_its_name(kind, peak):
    assert hardware.peak_flops(types.SimpleNamespace(platform="gpu", device_kind=kind)) == peak
