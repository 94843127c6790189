"""The memory, FLOPs and collectives of a compiled program, read from the compiler's output.

For TPU and GPU programs, including those compiled without such a device (``costs.targets``).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import stages

from jaxlinear.costs import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_SCRATCH = re.compile(r", s8\[\d+\](?:\{[^}]*\})?\)$")  # cuBLAS's workspace, as a result of its call
# Operations that move, name or exchange values but compute nothing.
_IDLE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|copy|opt-barrier|after-all|send|recv|.*-(start|update|done)|"
    rf"{'|'.join(KINDS)}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    ``bytes`` is what a device contributes (its shard, for an all-gather) each time it runs; ``devices`` is the number that
    take part; ``axes`` are the mesh axes along which they differ. ``runs`` is how often it runs in the whole program,
    including loop trips; None if unknown. ``operation`` is its origin in the traced program.
    ``during`` are the operations computed between its start and its end. It is empty if the exchange is not asynchronous,
    or if these operations together read and write less than a tenth of the bytes received: memory is several times as fast
    as links, so they hide next to nothing of it.
    ``between_slices``: over the network, between the chips at the same place in several slices, through their hosts.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    bytes: int
    runs: int | None
    operation: str
    asynchronous: bool
    during: tuple[str, ...]
    between_slices: bool = False

    @property
    def received(self) -> float:
        """Bytes that a device receives each time, by the least that each kind needs (a ring)."""
        others = self.devices - 1
        share = {
            "all-gather": others,
            "reduce-scatter": others / self.devices,
            "all-reduce": 2 * others / self.devices,
            "collective-permute": 1,
        }
        return self.bytes * share.get(self.kind, others / self.devices)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. ``aliased`` bytes of the outputs reuse the memory of donated arguments. ``peak``, for TPUs, is
    what libtpu compares with a device's memory: the most that is held at any time, without the code. The sum of the parts
    may be more than a device has although libtpu accepts the program. For others ``peak`` is None: XLA for GPUs allocates
    all temporaries at once, for the whole of the program."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None

    @property
    def total(self) -> int:
        """Bytes that a device holds at the same time."""
        if self.peak is not None:
            return self.peak
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """``flops`` and ``seconds`` are XLA's own estimates for one device: None if the compiler gives none (GPU), or a
    negative number (TPU, for some programs with collectives in loops). Both count a loop's body once. ``cycles`` sums XLA's
    estimates for each fusion and copy, times loop trips where known; None if it gives none. Our kernels and collectives are
    not included."""

    memory: Memory
    collectives: tuple[Collective, ...]
    flops: float | None
    seconds: float | None
    cycles: int | None


def read(compiled: stages.Compiled, mesh: jax.sharding.Mesh) -> Program:
    """All of this for a program on this mesh."""
    stats, text = compiled.memory_analysis(), compiled.as_text()
    assert stats is not None and text is not None
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
        stats.peak_memory_in_bytes if mesh.devices.flat[0].platform == "tpu" else None,
    )
    cost = compiled.cost_analysis() or {}
    flops, seconds = (x if x is not None and x > 0 else None for x in (cost.get("flops"), cost.get("optimal_seconds")))
    return Program(memory, collectives(text, dict(mesh.shape)), flops, seconds, cycles(text))


def cycles(text: str) -> int | None:
    """The sum of libtpu's estimates for the instructions of a compiled program, each times how often it runs."""
    module = hlo.parse(text)
    estimates = [
        int(found[1]) * (module.runs[name] or 1)
        for name in sequences(module)
        for line in module.computations[name]
        if (found := re.search(r'"estimated_cycles":"(\d+)"', line.attributes))
    ]
    return sum(estimates) if estimates else None


def collectives(text: str, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """The collectives of a compiled program, from its text and the sizes of its mesh's axes, in the mesh's order. Leaves
    out those over axes of one device, which XLA may not have removed."""
    module = hlo.parse(text)
    found = []
    for name in sequences(module):
        for line, between in _exchanges(module, module.computations[name]):
            kind = line.opcode.removesuffix("-start")
            groups = _groups(line.attributes, math.prod(mesh.values()))
            axes = _axes(groups, mesh)
            if not axes:
                continue
            found.append(
                _with_work(
                    module,
                    between or (),
                    kind=kind,
                    axes=axes,
                    devices=math.prod(mesh[axis] for axis in axes) if kind == "collective-permute" else len(groups[0]),
                    bytes=sum(module.sizes[operand] for operand in line.operands),
                    runs=module.runs[name],
                    operation=line.operation,
                    asynchronous=between is not None,
                )
            )
        for line, between in _between_slices(module.computations[name]):
            found.append(
                _with_work(
                    module,
                    between,
                    kind=_attribute(line, "_xla_megascale_transfer_type").lower().replace("_", "-"),
                    axes=("data",),  # the only axis along which slices are laid out (parallel.mesh)
                    devices=_slices(_attribute(line, "_xla_megascale_target")),
                    bytes=module.sizes[line.operands[0]],
                    runs=module.runs[name],
                    operation=line.operation,
                    asynchronous=True,
                    between_slices=True,
                )
            )
    return tuple(found)


def _with_work(module: hlo.Module, between: Iterable[hlo.Instruction], **known: Any) -> Collective:
    """The collective, with the operations that these instructions compute during it."""
    one = Collective(**known, during=())
    enough = sum(moved(module, work) for work in between) >= one.received / 10
    return dataclasses.replace(one, during=_computed(module, between)) if enough else one


def moved(module: hlo.Module, work: hlo.Instruction) -> float:
    """Upper bound of the bytes that an instruction reads and writes: for a loop all it has; for an update in place the
    update; for an array from which a fusion only cuts slices, the slices."""
    if _IDLE.fullmatch(work.opcode):
        return 0
    lines = (
        [line for name in work.called for line in module.computations.get(name, ())] if work.opcode == "fusion" else []
    )
    by_name = {line.name: line for line in lines}
    last = lines[-1] if lines else work
    while last.opcode == "bitcast" and last.operands[0] in by_name:
        last = by_name[last.operands[0]]
    if last.opcode == "dynamic-update-slice" and last.operands[1] in by_name:
        return 2 * hlo.size(by_name[last.operands[1]].shape)
    calls = [line for line in lines if line.opcode == "custom-call"]
    if calls and '"dynamic_slice_fusion"' in work.attributes:  # JAX 0.11, GPU: a product reading or writing slices
        return sum(moved(module, call) for call in calls)
    shape = _SCRATCH.sub("", work.shape) if work.opcode == "custom-call" else work.shape
    inputs = {int(line.inside): line.name for line in lines if line.opcode == "parameter"}
    return hlo.size(shape) + sum(
        min(module.sizes.get(name, 0), _sliced(lines, inputs[i]) if i in inputs else math.inf)
        for i, name in enumerate(work.operands)
    )


def _sliced(lines: list[hlo.Instruction], name: str) -> float:
    """Bytes of the slices that these lines cut from an array; infinity if they use it in any other way."""
    total = 0.0
    for line in lines:
        if name not in line.operands:
            continue
        if line.opcode == "bitcast":
            total += _sliced(lines, line.name)
        elif line.opcode in ("dynamic-slice", "slice") and line.operands.index(name) == 0:
            total += hlo.size(line.shape)
        else:
            return math.inf
    return total


def _computed(module: hlo.Module, between: Iterable[hlo.Instruction]) -> tuple[str, ...]:
    """The operations that these instructions compute."""
    inner = (inner for work in between for inner in module.within(work) if not _IDLE.fullmatch(inner.opcode))
    return tuple(dict.fromkeys(one.operation for one in inner if one.operation))


def sequences(module: hlo.Module) -> list[str]:
    """The computations whose instructions run one after another: not fused, wrapped or applied ones."""
    found = [module.entry]
    for name in found:
        for line in module.computations[name]:
            if line.opcode in ("while", "call", "conditional"):
                found += [called for called in line.called if called not in found]
    return found


def _exchanges(
    module: hlo.Module, lines: list[hlo.Instruction]
) -> Iterator[tuple[hlo.Instruction, list[hlo.Instruction] | None]]:
    """Each collective in these lines, with the lines between its start and its end, if it has both."""
    chains: dict[str, tuple[hlo.Instruction, list[int]]] = {}
    for i, line in enumerate(lines):
        if line.opcode in KINDS:
            yield line, None
        elif line.opcode.removesuffix("-start") in KINDS:
            yield line, lines[i + 1 : _end(lines, i)]
        elif line.opcode in ("async-start", "call-start", "fusion"):  # call-start: on a SparseCore
            for inner in module.within(line):
                if inner.opcode not in KINDS:
                    continue
                if line.opcode != "fusion":
                    yield inner, lines[i + 1 : _end(lines, i)]
                elif _is_scattered(module, line, inner):
                    yield dataclasses.replace(inner, opcode="reduce-scatter"), None
                else:  # on TPU it spans a chain of fusions, each of which contains it again beside its own work
                    chain = re.search(r'chain_id="(\d+)"', inner.attributes)
                    chains.setdefault(chain[1] if chain else inner.name, (inner, []))[1].append(i)
    for first, links in chains.values():
        yield first, lines[links[0] + 1 : links[-1]] if len(links) > 1 else None


def _is_scattered(module: hlo.Module, fusion: hlo.Instruction, inner: hlo.Instruction) -> bool:
    """Whether only a device's own part of the sum leaves the fusion: libtpu's ``all-reduce-scatter``."""
    lines = [line for name in fusion.called for line in module.computations.get(name, ())]
    users = [line for line in lines if inner.name in line.operands]
    return inner.opcode == "all-reduce" and [line.opcode for line in users] == ["dynamic-slice"] == [lines[-1].opcode]


def _between_slices(lines: list[hlo.Instruction]) -> Iterator[tuple[hlo.Instruction, list[hlo.Instruction]]]:
    """Each collective between slices. The program contains only the transfers from and to the host: gives its ``send`` and
    the lines from there until the result is received."""
    received = {_attribute(line, _RENDEZVOUS): i for i, line in enumerate(lines) if line.opcode == "recv"}
    for i, line in enumerate(lines):
        if line.opcode == "send" and "xla_megascale_runtime" in line.attributes:
            yield line, lines[i + 1 : _end(lines, received[_attribute(line, _RENDEZVOUS)])]


_RENDEZVOUS = "_xla_host_transfer_rendezvous"


def _attribute(line: hlo.Instruction, name: str) -> str:
    """A frontend attribute's value, empty if there is none."""
    found = re.search(rf'\b{name}="([^"]*)"', line.attributes)
    return found[1] if found else ""


def _slices(target: str) -> int:
    """The number of slices in ``{1,2}x{0:3}``: here slices 1 and 2, with their chips 0 to 3."""
    count = 0
    for part in target[1 : target.index("}")].split(","):
        first, _, last = part.partition(":")
        count += int(last or first) - int(first) + 1
    return count


def _end(lines: list[hlo.Instruction], start: int) -> int:
    """Where what starts at ``start`` is done: the last line of the chain that passes it on."""
    name, end = lines[start].name, start
    for i in range(start + 1, len(lines)):
        if lines[i].opcode.endswith(("-update", "-done")) and name in lines[i].operands:
            name, end = lines[i].name, i
            if lines[i].opcode.endswith("-done"):
                break
    return end


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    shape = tuple(mesh.values())
    varies = np.zeros(len(shape), bool)
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.array(group), shape))
        varies |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(axis for axis, differs in zip(mesh, varies, strict=True) if differs)


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Numbers of the devices that exchange with each other: pairs for a permute, else one of XLA's three notations."""
    pairs = re.search(r"source_target_pairs=\{([^=]*?\})\}", attributes)
    listed = pairs or re.search(r"replica_groups=\{(\{[^=]*?\})\}", attributes)
    if listed:
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(rf"replica_groups=({_IOTA})", attributes)
    if iota:
        return _iota(iota[1]).tolist()
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((.*?)\))? ?\{([^}]*)\}", attributes)
    if meshed:
        sizes = {axis: int(size) for axis, size in re.findall(r"'?([\w.]+)'?=(\d+)", meshed[1])}
        return _mesh_groups(sizes, meshed[2], re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", meshed[3])).tolist()
    return [list(range(devices))]


_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"


def _iota(text: str) -> np.ndarray:
    """``[groups, devices]<=[reshape]T(permutation)``: the numbers from 0 on, in that layout."""
    to, of, turn = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # type: ignore[union-attr]
    numbers = lambda x: tuple(int(i) for i in x.split(","))  # noqa: E731
    grid = np.arange(math.prod(numbers(of))).reshape(numbers(of))
    return (grid.transpose(numbers(turn)) if turn else grid).reshape(numbers(to))


def _mesh_groups(sizes: dict[str, int], ids: str | None, axes: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups along some axes of XLA's own mesh. An axis written ``x:(p)n`` is the part of size n after those of size p."""
    grid = np.arange(math.prod(sizes.values()))
    if ids:
        if ids.startswith("["):  # also [reshape]T(permutation) alone
            grid = _iota(ids if "<=" in ids else f"[{grid.size}]<={ids}").ravel()
        else:
            grid = np.array([int(i) for i in ids.split(",")])
    shape: list[int] = []
    grouped: list[int] = []  # which axes of the shape
    for axis, size in sizes.items():
        parts = [(int(before or 1), int(part or size)) for name, before, part in axes if name == axis]
        # The axis is cut at the ends of each part, major first.
        cuts = sorted({1, size, *(before for before, _ in parts), *(before * part for before, part in parts)})
        for low, high in itertools.pairwise(cuts):
            if any(before <= low and high <= before * part for before, part in parts):
                grouped.append(len(shape))
            shape.append(high // low)
    grid = np.moveaxis(grid.reshape(shape), grouped, range(-len(grouped), 0)) if grouped else grid.reshape(*shape, 1)
    return grid.reshape(-1, math.prod(shape[i] for i in grouped))
