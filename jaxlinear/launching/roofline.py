"""The least time of a step, from the data sheets of its devices: products, memory and links, each at its full rate."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxlinear.costs.devices import Device, axes_of, device_of, link_of, most_gathering
from jaxlinear.costs.hardware import PEAK_FLOPS
from jaxlinear.costs.programs import Collective
from jaxlinear.errors import UserError

ASSUMPTIONS = (
    "every product runs at the matrix unit's peak, float32 products at their default precision: one pass of bfloat16 on "
    "TPU, TF32 on GPU, half as fast; recurrences and elementwise work are free",
    "memory traffic is only the state, read and written once, and the activations kept for the backward pass, written "
    "and read",
    "collectives run one after another, each at the full rate of all links that its devices can use; between slices "
    "at the data-centre network's rate per chip",
    "the least time overlaps products, memory and collectives, except for collectives during which the program computes "
    "nothing; the most overlaps nothing",
)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step. ``exchanges`` is None if the collectives are not known; ``waited`` is the part of it during
    which nothing is computed; ``counted`` is False if some are in a loop of unknown trip count, and are counted once.
    ``products_counted`` is the same for products."""

    products: float
    products_counted: bool
    memory: float
    exchanges: float | None
    waited: float
    counted: bool
    peak_flops: float  # of one device in bfloat16, FLOP/s: the denominator of MFU, whatever the dtype

    @property
    def least(self) -> float:
        """Seconds: a lower bound under ``ASSUMPTIONS``."""
        return max(self.products, self.memory, (self.exchanges or 0.0) - self.waited) + self.waited

    @property
    def most(self) -> float | None:
        """Seconds if nothing overlaps with anything else; None if not all of it is known."""
        if self.exchanges is None or not self.counted or not self.products_counted:
            return None
        return self.products + self.memory + self.exchanges


class Row(NamedTuple):
    """The collectives of one kind over the same axes in a step; ``bytes`` are those that a device receives."""

    kind: str
    axes: tuple[str, ...]
    devices: int
    runs: int
    bytes: int
    hidden: int  # the runs that proceed while the device computes
    known: bool  # False: some are in a loop of unknown trip count, and are counted once
    between_slices: bool


def times(
    kind: str,
    dtype: str,
    mesh: Mapping[str, int],
    flops: float,
    bytes_: float,
    collectives: Sequence[Collective] | None,
    flops_counted: bool = True,
) -> Times:
    """``flops`` and ``bytes_`` are per device; ``kind`` is its ``jax.Device.device_kind``, and ``dtype`` that of the
    products. ``collectives`` is None if they are not known; ``flops_counted`` is False if ``flops`` are not all."""
    device = device_of(kind)
    if kind not in PEAK_FLOPS:
        raise UserError(f"the peak FLOPs of {kind} are unknown (jaxlinear/costs/hardware.py)")
    peak = PEAK_FLOPS[kind]
    # Products that ask for more precision are slower: the least time remains a bound.
    rate = peak / 2 if dtype == "float32" and not kind.startswith("TPU") else peak
    exchanges, waited, counted = None, 0.0, True
    if collectives is not None:
        taken = [((c.runs or 1) * seconds(c, device, _span(c.axes, mesh)), c) for c in collectives]
        exchanges, waited = (sum(t for t, _ in taken), sum(t for t, c in taken if not c.during))
        counted = all(c.runs is not None for c in collectives)
    return Times(flops / rate, flops_counted, bytes_ / device.memory_bandwidth, exchanges, waited, counted, peak)


def seconds(collective: Collective, device: Device, span: int) -> float:
    """The least time of one run, between devices that are among ``span`` neighbouring ones."""
    if collective.devices < 2:
        return 0.0
    if collective.between_slices:
        assert device.network is not None
        return device.network.start + collective.received / device.network.gathering
    link = link_of(device, span)
    if collective.kind == "collective-permute":
        return link.permute(collective.devices, 1, collective.bytes)
    axes = axes_of(device, collective.devices)
    # Around a torus in both directions, one axis after another.
    steps = int(axes * round(collective.devices ** (1 / axes)) // 2) if link.torus else collective.devices - 1
    passes = 2 if collective.kind == "all-reduce" else 1
    received = collective.received / most_gathering(device, collective.devices, span)
    return link.start + passes * steps * link.hop + received


def grouped(collectives: Iterable[Collective]) -> list[Row]:
    """By kind and axes, with those between slices kept separate; the most bytes come first."""
    rows: dict[tuple[str, tuple[str, ...], int, bool], list[Collective]] = {}
    for one in collectives:
        rows.setdefault((one.kind, one.axes, one.devices, one.between_slices), []).append(one)
    found = [
        Row(
            kind=kind,
            axes=axes,
            devices=devices,
            runs=sum(c.runs or 1 for c in group),
            bytes=round(sum((c.runs or 1) * c.received for c in group)),
            hidden=sum(c.runs or 1 for c in group if c.during),
            known=all(c.runs is not None for c in group),
            between_slices=between_slices,
        )
        for (kind, axes, devices, between_slices), group in rows.items()
    ]
    return sorted(found, key=lambda row: -row.bytes)


def _span(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    """Devices between the first and the last of a group, in the order of the mesh."""
    names = list(mesh)
    first = min((names.index(axis) for axis in axes), default=len(names))
    return math.prod([mesh[name] for name in names[first:]])
