"""Other settings of a run on the same devices: meshes, remat policies and microbatches, first estimated and then compiled.

The estimates order what is worth compiling and drop what cannot fit; they are not shown as results.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import config_dict

from jaxlinear import config as configs
from jaxlinear.config_checks import is_read
from jaxlinear.costs.devices import device_of, most_gathering
from jaxlinear.costs.targets import Target
from jaxlinear.errors import UserError
from jaxlinear.launching import roofline, sizing
from jaxlinear.launching.sizing import Sizing
from jaxlinear.models import parameters
from jaxlinear.models.language_model import REMAT_POLICIES
from jaxlinear.parallel import cost, sharding
from jaxlinear.parallel import mesh as meshes
from jaxlinear.training import state as states
from jaxlinear.training.job import check_mesh, with_vocabulary_of_data
from jaxlinear.training.optimizer import make_optimizer

_MICROBATCHES = (1, 2, 4, 8, 16, 32)
_FULL = 0.9  # of a device's memory, what a program may take by its estimate, which is coarse


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings, and their estimates: bytes per device, seconds per step."""

    mesh: dict[str, int]
    remat: str
    microbatches: int
    memory: int
    seconds: float

    def applied(self, config: config_dict.ConfigDict) -> config_dict.ConfigDict:
        """The config with these settings in place of its own."""
        config = config.copy_and_resolve_references()
        config.mesh.update(self.mesh)
        config.model.remat, config.training.microbatches = self.remat, self.microbatches
        return config

    def flags(self) -> str:
        """As options of ``launch/train.py``."""
        named = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]
        rest = [f"--config.model.remat={self.remat}", f"--config.training.microbatches={self.microbatches}"]
        return " ".join([*named, *rest])


def search(
    config: config_dict.ConfigDict,
    target: Target,
    count: int,
    show: Callable[[str], Any] = lambda _: None,
    *,
    compiled: Sizing | None = None,
) -> list[Sizing]:
    """Compiles the ``count`` candidates that should be fastest, and ranks them with ``compiled``, the config's own step:
    those that fit come first, by their least time and, where that is equal, by their memory."""
    found = [] if compiled is None else [compiled]
    for candidate in candidates(config, target, compiled)[:count]:
        show(f"compiling {candidate.flags()}")
        try:
            found.append(sizing.size(candidate.applied(config), target))
        except UserError as error:  # of one candidate: the others are worth the time that they took to compile
            show(f"left out: {error}")
    return sorted(found, key=lambda sized: (not sized.fits, sized.time.least, sized.memory.total))


def candidates(config: config_dict.ConfigDict, target: Target, compiled: Sizing | None = None) -> list[Candidate]:
    """All settings that should fit, the fastest first. The batch is unchanged. ``compiled`` is the config's own step: its
    settings are left out, and if it takes more memory than its estimate, so should all others."""
    config = with_vocabulary_of_data(configs.resolve(config))
    model = _Model(config, target)
    found, known, more = [], None, 1.0
    if compiled is not None:
        known = compiled.mesh, compiled.remat, compiled.microbatches
        mesh = AbstractMesh(tuple(compiled.mesh.values()), tuple(compiled.mesh))
        own = model.reckon(compiled.mesh, mesh, compiled.remat, compiled.microbatches)
        more = max(1.0, compiled.memory.total / own.memory)
    for microbatches in (n for n in _MICROBATCHES if config.training.batch_size % n == 0):
        config.training.microbatches = microbatches
        for sizes in _meshes(len(target.devices)):
            if sizes["data"] % target.slices:
                continue
            mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
            if any(count % sizes["tensor"] for count in _heads(config)) or not _allowed(config, mesh):
                continue
            for remat in REMAT_POLICIES:
                candidate = model.reckon(sizes, mesh, remat, microbatches)
                candidate = dataclasses.replace(candidate, memory=int(candidate.memory * more))
                if (sizes, remat, microbatches) != known and candidate.memory <= _FULL * target.memory_bytes:
                    found.append(candidate)
    return sorted(found, key=_order)


def _order(one: Candidate) -> tuple:
    """The fastest first; among those within 1%, the simplest mesh, then the fewest microbatches."""
    axes = (one.mesh["tensor"], one.mesh["sequence"], one.mesh["expert"], one.mesh["fsdp"])
    return round(math.log(one.seconds) * 100), *axes, one.microbatches, one.memory


def _heads(config: config_dict.ConfigDict) -> list[int]:
    """The head counts of the parts that mix along time; empty for a model that mixes only by channels."""
    named = ("num_heads", "recurrent_heads")
    return [config.model[key] for key in named if config.model[key] and is_read(config, f"model.{key}")]


def _allowed(config: config_dict.ConfigDict, mesh: Any) -> bool:
    try:
        check_mesh(config, mesh)
    except UserError:
        return False
    return True


def _meshes(devices: int, axes: tuple[str, ...] = meshes.AXES) -> Iterator[dict[str, int]]:
    """All sizes of the axes whose product is the number of devices."""
    if len(axes) == 1:
        yield {axes[0]: devices}
        return
    for size in (n for n in range(1, devices + 1) if devices % n == 0):
        for rest in _meshes(devices // size, axes[1:]):
            yield {axes[0]: size} | rest


class _Model:
    """What follows from a config whatever the mesh."""

    def __init__(self, config: config_dict.ConfigDict, target: Target):
        self._config, self._kind, self._slices = config, target.devices[0].device_kind, target.slices
        self._architecture = parameters.describe(configs.model_config(config))
        optimizer = make_optimizer(config, self._architecture)
        state = states.shapes(self._architecture, optimizer)
        self._state_over_parameters = cost.size_of(state) / cost.size_of(state.parameters)
        self._kept, self._flops = {}, {}
        for remat in REMAT_POLICIES:
            changed = config.copy_and_resolve_references()
            changed.model.remat = remat
            architecture = parameters.describe(configs.model_config(changed))
            self._kept[remat], self._flops[remat] = sizing.passes(changed, architecture, target)
        # Over shards of time there is no kernel for full attention, which then multiplies queries with later keys too: half
        # of the pairs of tokens, in two products of the forward pass and five of the gradient.
        tokens, length = config.training.batch_size * config.training.sequence_length, config.training.sequence_length
        self._with_later = (
            7 * self._architecture.config.layers.count("attention") * config.model.width * tokens * length
        )

    def reckon(self, sizes: dict[str, int], mesh: Any, remat: str, microbatches: int) -> Candidate:
        config, tokens = self._config, self._config.training.batch_size * self._config.training.sequence_length
        own = self._parameters_on_one(mesh)
        gathered = own * sizes["fsdp"]
        local = tokens / sizing.batch_shards(sizes) / microbatches  # tokens per device in a microbatch
        layers = config.model.num_layers
        in_a_layer = self._kept["none"] / tokens / layers
        memory = own * (self._state_over_parameters + (1 if microbatches == 1 else 2))
        memory += local * (self._kept[remat] / tokens + in_a_layer)
        # Of a layer: kernels gathered, or gradients before and after they are summed.
        memory += 2 * gathered / layers if sizes["fsdp"] * sizes["data"] * sizes["sequence"] > 1 else 0

        device = device_of(self._kind)
        one = sizes | {"data": sizes["data"] // self._slices}  # in one slice
        received = dict.fromkeys(sizes, 0.0)
        passes = 3 if remat == "full" else 2
        received["fsdp"] = (passes * microbatches + 1) * gathered * (1 - 1 / sizes["fsdp"])
        sums = microbatches if sizes["tensor"] > 1 else 1  # of copies (``sharding.summed_over_copies``)
        received["data"] = sums * 2 * own * (1 - 1 / one["data"])
        received["sequence"] = microbatches * 2 * own * (1 - 1 / sizes["sequence"])
        width = config.model.width * jnp.dtype(config.model.dtype).itemsize
        activations = 2 * (passes + 1) * layers * width * local * microbatches
        received["tensor"] = activations * 2 * (1 - 1 / sizes["tensor"])
        received["expert"] = activations * config.model.experts_per_token * (1 - 1 / sizes["expert"])
        names = list(sizes)
        exchanges = sum(
            size / most_gathering(device, one[axis], math.prod(one[name] for name in names[names.index(axis) :]))
            for axis, size in received.items()
        )
        if self._slices > 1:  # each chip of a row of ``data`` exchanges its part of the sum with the other slices
            assert device.network is not None
            exchanges += sums * 2 * own / one["data"] * (1 - 1 / self._slices) / device.network.gathering
        flops = self._flops[remat] + (self._with_later if sizes["sequence"] > 1 else 0)
        times = roofline.times(self._kind, config.model.dtype, sizes, flops / math.prod(sizes.values()), 0.0, ())
        # A tenth of what is hidden still counts: of two that hide all they exchange, the one exchanging less is first.
        seconds = max(times.products, exchanges) + 0.1 * min(times.products, exchanges)
        return Candidate(sizes, remat, microbatches, int(memory), seconds)

    def _parameters_on_one(self, mesh: Any) -> int:
        total = 0
        for axes, shape in zip(
            jax.tree.leaves(self._architecture.axes, is_leaf=lambda x: isinstance(x, tuple)),
            jax.tree.leaves(self._architecture.shapes),
            strict=True,
        ):
            total += shape.dtype.itemsize * math.prod(sharding.shard_shape(axes, shape.shape, mesh))
        return total
