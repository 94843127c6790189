"""Devices and the links between them, from data sheets: the basis of the cost model (``parallel.cost``)."""

from typing import NamedTuple

from jaxlinear import log_once


class Link(NamedTuple):
    """How shards of one axis reach each other."""

    name: str
    bandwidth: float  # bytes/s from one device to another, one way
    gathering: float  # bytes/s that a device receives in an all-gather
    start: float  # seconds before a collective moves its first byte
    hop: float  # seconds for each step of it
    torus: bool  # each device is linked only to its neighbours, in a ring; otherwise all are joined by switches

    def gather(self, shards: int, size: int) -> float:
        """Seconds for an all-gather of ``size`` bytes from each shard; round a torus it goes both ways."""
        steps = shards // 2 if self.torus else shards - 1
        return self.start + steps * self.hop + (shards - 1) * size / self.gathering

    def permute(self, shards: int, distance: int, size: int) -> float:
        """Seconds for each shard to send ``size`` bytes to the shard ``distance`` places on."""
        steps = min(distance, shards - distance) if self.torus else 1  # hops; each link carries as many shards' bytes
        return self.start + steps * self.hop + steps * size / self.bandwidth


class Device(NamedTuple):
    """One device."""

    name: str
    flops: float  # FLOP/s of float32 products, which states need
    memory: float  # bytes
    memory_bandwidth: float  # bytes/s
    link: Link
    domain: int | None = None  # devices that ``link`` joins; None: all (on TPUs, all of a slice)
    beyond: Link | None = None  # joins more devices than that
    axes: int = 1  # of the torus
    network: Link | None = None  # between slices of TPUs


def _torus(name: str, one_way: float) -> Link:
    # One axis of the torus; a gather uses both of its directions. ``parallel.mesh`` lays a mesh axis along one torus axis
    # where the sizes allow it; where it spans several, paths are shorter and there are more links. A microsecond a hop:
    # "How to Scale Your Model" (jax-ml.github.io/scaling-book), on latency in inference.
    return Link(f"ICI of {name}", one_way, 2 * one_way, 1e-6, 1e-6, True)


def _network(name: str, one_way: float) -> Link:
    # No data sheet gives the time before an exchange's first byte.
    return Link(f"the network between slices of {name}", one_way, one_way, 0.0, 0.0, False)


# Memory and its bandwidth, and a chip's ICI bandwidth in both directions over all its links (400, 1,200, 800 and 1,200
# GB/s, on 4, 6, 4 and 6 links): cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. Where pages differ, the larger figure is
# used, as the least time of a step is a bound: for v6e's memory the tpu7x page has 1,638 GB/s, the v6e page 1,600. The same
# pages give the data centre network: 6.4 Tbit/s for 256 chips of v5e; per chip 50 Gbit/s on v5p, 100 on v6e and TPU7x. A
# float32 product is six bfloat16 ones (XLA's HIGHEST precision).
_V5E = Device("TPU v5e", 197e12 / 6, 16e9, 819e9, _torus("v5e", 50e9), axes=2, network=_network("v5e", 3.125e9))
_V5P = Device("TPU v5p", 459e12 / 6, 95 * 2**30, 2765e9, _torus("v5p", 100e9), axes=3, network=_network("v5p", 6.25e9))
_V6E = Device("TPU v6e", 918e12 / 6, 32e9, 1638e9, _torus("v6e", 100e9), axes=2, network=_network("v6e", 12.5e9))
# A chip is two devices, each with half of its FLOP/s, memory and network. The bandwidth between them is six times that of a
# link of the torus (cloud.google.com/tpu/docs/tpu7x). Both use the chip's links, and one may use them all.
_PAIR = Link("the two halves of a chip of TPU7x", 600e9, 600e9, 1e-6, 0.0, False)
_TPU7X = Device(
    name="TPU7x",
    flops=2307e12 / 2 / 6,
    memory=192 * 2**30 / 2,
    memory_bandwidth=7380e9 / 2,
    link=_PAIR,
    domain=2,
    beyond=_torus("TPU7x", 100e9),
    axes=3,
    network=_network("TPU7x", 6.25e9),
)

# NVIDIA's data sheets. H100 SXM: 67 TFLOP/s float32, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways together. DGX H100:
# eight GPUs, each with a network port of 400 Gb/s; a gather across hosts reaches each host once, over all eight ports.
# Latencies: NCCL's own (src/graph/tuning.cc, ring, protocol LL128).
_NVLINK = Link("NVLink", 450e9, 450e9, 14e-6, 1.9e-6, False)
# A step between hosts takes 4 us; in a ring, one step in eight is between hosts.
_INFINIBAND = Link("400 Gb/s a GPU between hosts of 8", 50e9, 400e9, 14e-6, (7 * 1.9e-6 + 4.0e-6) / 8, False)
_H100 = Device("NVIDIA H100", 67e12, 80e9, 3.35e12, _NVLINK, 8, _INFINIBAND)
_H200 = _H100._replace(name="NVIDIA H200", memory=141e9, memory_bandwidth=4.8e12)  # its data sheet; the rest as H100

# Devices of one process, linked by its memory: round figures for a small machine, for trials on CPU.
_CPU = Device("a CPU", 5e10, 8e9, 6e9, Link("shared memory", 6e9, 6e9, 5e-5, 1e-6, False))

_DEVICES = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _TPU7X,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": _H200,
    "cpu": _CPU,
}


def device_of(kind: str) -> Device:
    """The device of a ``jax.Device.device_kind``. One that is not in the table is treated as an H100; its name and the
    log say so."""
    if kind not in _DEVICES:
        log_once.info_once(
            f"the cost model has no figures of {kind}: it chooses exchanges by those of an NVIDIA H100, unless "
            "parallel.exchange and parallel.attention are set"
        )
        return _H100._replace(name=f"{kind} (not in the table; the figures are those of an NVIDIA H100)")
    return _DEVICES[kind]


def link_of(device: Device, span: int) -> Link:
    """The link that joins the devices of a row of shards spanning ``span`` neighbouring devices."""
    return device.link if device.beyond is None or span <= (device.domain or span) else device.beyond


def axes_of(device: Device, devices: int) -> int:
    """The most axes of the torus over which a group of ``devices`` devices may lie."""
    return max(1, min(device.axes, devices.bit_length() - 1))


def most_gathering(device: Device, devices: int, span: int) -> float:
    """The most bytes/s that a device may receive in a collective of ``devices`` devices among ``span`` neighbouring
    ones: over all of their links and, between hosts, over the ports of those devices of a host that take part."""
    link = link_of(device, span)
    if link.torus:
        return link.gathering * axes_of(device, devices)
    if link is device.beyond and device.domain:
        return min(link.gathering, link.bandwidth * max(1, device.domain * devices // span))
    return link.gathering
