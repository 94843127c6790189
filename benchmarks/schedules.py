"""What libtpu's static schedule says about a program compiled for an absent TPU. Needs only JAX and libtpu.

A TPU core runs a static schedule of bundles, one per cycle when nothing stalls, and libtpu writes it out for each fusion
and kernel. The bundles of the loop bodies times the loops' trips are the compute cycles, a lower bound on the time. The
other lower bound is the bytes over the memory bandwidth.
"""

import atexit
import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

# Operations per cycle of a device's matrix units: four arrays of 128 x 128 per core, and on v5p two cores, which share a
# kernel's parallel grid; on v6e and TPU7x two arrays of 256 x 256, to which the schedules give two rows per cycle.
MATRIX_UNIT = {"v5e": 4 * 2 * 128**2, "v5p": 2 * 4 * 2 * 128**2, "v6e": 4 * 2 * 256**2, "tpu7x": 4 * 2 * 256**2}

# A device's published figures (cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}): bytes per second of HBM, and bfloat16
# operations per second. A device of TPU7x is half a chip.
_HBM = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1638e9, "tpu7x": 7380e9 / 2}
_OPERATIONS = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "tpu7x": 2307e12 / 2}

# Bytes and cycles per second. Clock rates are not published: these are the ones at which the matrix units reach their peak.
RATES = {chip: (_HBM[chip], _OPERATIONS[chip] / MATRIX_UNIT[chip]) for chip in MATRIX_UNIT}

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]*)\s*:\s*([> ]*)\{")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder (?:\(\S+\), )?(\S+), (\d+) /\* loop exit test")
_COUNTED = re.compile(r"= sphi \S+, (%\w+)")
_COPIED = re.compile(r"%(?:\w*copy|\w*transpose)[\w.]* = (\w+)\[([\d,]+)\]\S* (?:copy|transpose|fusion)\(")
_SIZES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1, "s8": 1, "u8": 1, "f16": 2, "u32": 4}


def begin(directory: str | None = None) -> str:
    """Call this before importing jax. Returns the directory to which libtpu will write its schedules, up to a gigabyte; by
    default one that is deleted when the program ends."""
    if directory is None:
        directory = tempfile.mkdtemp(prefix="schedules")
        atexit.register(shutil.rmtree, directory)
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true",
    )
    return directory


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``function(directory of the schedules, *arguments)`` in a fork of this process, which must not have imported
    jax. Each program needs its own process, as libtpu writes all schedules of a process to one directory."""
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory(prefix="schedules") as directory,
        concurrent.futures.ProcessPoolExecutor(1, fork, begin, (directory,)) as pool,
    ):
        return pool.submit(function, directory, *arguments).result()


class Bundle(NamedTuple):
    depth: int  # of the loop that the bundle is marked as being in; some bundles in loops are not marked
    begins: bool  # the bundle begins a loop's body
    trips: int | None  # of a loop, if the bundle holds its test and the test is against a constant
    counter: str | None  # what that test compares
    counters: frozenset[str]  # carried over from the previous trip; at the start of a body, those of its loop


@dataclasses.dataclass
class Loop:
    depth: int
    first: int
    last: int  # the index of a bundle, like ``first``
    trips: float = math.nan
    times: float = math.nan  # how often the body runs, counting the trips of the outer loops


def read(path: pathlib.Path) -> tuple[list[Bundle], bool]:
    """The schedule of one fusion or kernel, and whether it is a kernel's."""
    bundles, text = [], path.read_text(errors="replace")
    for line in text.splitlines():
        if found := _BUNDLE.match(line):
            test = _EXIT.search(line)
            known = (int(test[2]), test[1]) if test else (None, None)
            counters = frozenset(_COUNTED.findall(line))
            bundles.append(Bundle(found[2].count(">"), found[1] == "LB", *known, counters))
    return bundles, "inlined_call_operand" in text


def loops(bundles: list[Bundle]) -> list[Loop]:
    """The loops, each before those inside it."""
    found: list[Loop] = []
    opened: list[Loop] = []
    for i, bundle in enumerate(bundles):
        if bundle.begins:
            opened = [loop for loop in opened if loop.depth < bundle.depth]
            opened.append(Loop(bundle.depth, i, i))
            found.append(opened[-1])
        for loop in opened:
            if bundle.depth >= loop.depth:
                loop.last = i
            # The test may be inside an inner loop.
            if bundle.trips is not None and bundle.counter in bundles[loop.first].counters:
                loop.trips = bundle.trips
    return found


def cycles(bundles: list[Bundle], pipelined: bool) -> float:
    """Bundles times trips; NaN if a trip count is not constant.

    ``pipelined``: the outer loop is the grid of a kernel, which makes two more trips than it has blocks: one to prefetch
    the first and one to wait for the last. The loops inside do not run in those two.
    """
    total, inside = 0.0, [1.0] * len(bundles)
    opened: list[Loop] = []
    for loop in loops(bundles):
        opened = [outer for outer in opened if outer.last >= loop.last]
        outer = opened[-1].times if opened else 1.0
        loop.times = outer * loop.trips
        if pipelined and len(opened) == 1:
            loop.times = (outer - 2) * loop.trips
        opened.append(loop)
        inside[loop.first : loop.last + 1] = [loop.times] * (loop.last + 1 - loop.first)
    for times in inside:
        total += times
    return total


def kernels(directory: str) -> dict[str, tuple[list[Bundle], bool]]:
    """``read`` of each fusion and kernel of the programs that were compiled, by the name of its instruction."""
    found = {}
    for path in sorted(pathlib.Path(directory).glob("*-final_bundles.txt")):
        name = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", path.name)
        if name is None or name.group(1) == "TLP" or name.group(1).startswith("<"):
            continue
        found[name.group(1)] = read(path)
    return found


def schedules(directory: str) -> dict[str, float]:
    """The cycles of each fusion and kernel."""
    return {name: cycles(*schedule) for name, schedule in kernels(directory).items()}


def device(topology: str):
    from jax.experimental import topologies

    options = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices[0]


def compile_for(topology: str, function, *shapes):
    """Compiles ``function`` for one chip of the topology."""
    import jax
    from jax.sharding import SingleDeviceSharding

    place = SingleDeviceSharding(device(topology))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return jax.jit(function).lower(*shapes).compile()


def relayouts(text: str) -> list[int]:
    """Bytes of each array of 1 MiB or more that the compiled program copies or transposes by itself or in a fusion."""
    found = []
    text = text[text.index("\nENTRY ") :]
    for kind, shape in _COPIED.findall(text):
        size = _SIZES.get(kind, 4) * math.prod(map(int, shape.split(",")))
        if size >= 2**20:
            found.append(size)
    return found


def report(directory: str, compiled, topology: str) -> dict:
    """Of one compiled program: its kernels' cycles, its bytes, and the time that each implies."""
    text = compiled.as_text()
    bandwidth, clock = RATES[topology.partition(":")[0]]
    cycles = schedules(directory)
    kernels = {
        name: value for name, value in cycles.items() if re.search(rf"%{re.escape(name)} = .*custom-call\(", text)
    }
    moved = compiled.cost_analysis()["bytes accessed"]
    return {
        "kernels": kernels,
        "cycles": sum(cycles.values()),
        "bytes": moved,
        "relayouts": relayouts(text),
        "compute_us": 1e6 * sum(cycles.values()) / clock,
        "memory_us": 1e6 * moved / bandwidth,
    }
