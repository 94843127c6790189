"""What a training step takes on devices that need not be present: its memory by kind, its exchanges, its FLOPs, and the
least time that follows from these.

The program is the one that ``launch/train.py`` runs, compiled by the target's own compiler. Its memory and collectives are
facts of that program; the time is computed from data sheets (``roofline``), not measured.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.extend import core
from ml_collections import config_dict

from jaxlinear import log_once
from jaxlinear.costs import programs, traced
from jaxlinear.costs.programs import Collective
from jaxlinear.costs.targets import Target
from jaxlinear.errors import UserError
from jaxlinear.launching import roofline
from jaxlinear.models import flops
from jaxlinear.models.parameters import Architecture
from jaxlinear.ops import backends
from jaxlinear.parallel import cost, sharding
from jaxlinear.training import ahead_of_time
from jaxlinear.training.step import make_objective

_SIZE = r"([\d.]+)([KMGT]?)B?"
# libtpu's two forms of this message. Both give all that the program takes: the second, too, includes its arguments.
_OUT_OF_MEMORY = re.compile(rf"Used {_SIZE} of \S+ hbm|required for HLO temporaries \({_SIZE}\)")


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Bytes per device by purpose. Parameters, optimiser and batch follow from shapes. For the rest of the program there is
    the compiler's figure; its parts, gradients and the activations kept for the backward pass, are estimated from shapes
    (activations as if nothing were spread over ``tensor``), and ``temporaries`` is what remains."""

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        """Bytes per device."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Sizing:
    """``memory_analysis`` is the compiler's own count, or None if it refused the program for its memory; ``memory`` then
    has what it said, and ``collectives`` is None too, since there is no program. ``flops`` are those of the model's
    formulas in a step of all devices; ``executed_flops`` are the products of the traced program, including what remat
    recomputes; ``mfu_bound`` is None if these are not all (``time.products_counted``). ``xla_seconds`` is XLA's own
    estimate, with every loop's body counted once; ``xla_cycles`` is its estimate for everything that is neither a kernel of
    ours nor a collective, with the loops' trips. Either is None if the compiler gives none."""

    target: str
    devices: int
    mesh: dict[str, int]
    remat: str
    microbatches: int
    parameters: int
    memory: Kinds
    memory_limit: int
    memory_analysis: programs.Memory | None
    flops: float
    executed_flops: float
    collectives: tuple[Collective, ...] | None
    choices: tuple[str, ...]
    xla_seconds: float | None
    xla_cycles: int | None
    time: roofline.Times
    tokens_a_step: int
    steps: int

    @property
    def fits(self) -> bool:
        """Whether the compiler accepted the program and a device has the memory for it."""
        return self.memory_analysis is not None and self.memory.total <= self.memory_limit

    @property
    def too_much(self) -> int:
        """Bytes per device by which the program is too large; negative if it fits."""
        return self.memory.total - self.memory_limit

    @property
    def tokens_a_day(self) -> float:
        """At most so many: at the least time of a step."""
        return 86_400 * self.tokens_a_step / self.time.least

    @property
    def days(self) -> float:
        """Days for the config's ``training.steps``, at the least time of a step."""
        return self.steps * self.time.least / 86_400

    @property
    def mfu_bound(self) -> float | None:
        """The MFU at the least time of a step, from 0 to 1; None if that is no bound."""
        if not self.time.products_counted:
            return None
        return self.flops / (self.time.least * self.time.peak_flops * self.devices)

    def to_json(self) -> dict[str, Any]:
        """Includes the derived values; collectives are summed by kind and axes."""
        values = dataclasses.asdict(self)
        if self.collectives is not None:
            values["collectives"] = [row._asdict() for row in roofline.grouped(self.collectives)]
        values["memory"]["total"] = self.memory.total
        derived = {name: getattr(self, name) for name in ("fits", "too_much", "tokens_a_day", "days", "mfu_bound")}
        return values | derived | {"time": values["time"] | {"least": self.time.least, "most": self.time.most}}


def size(config: config_dict.ConfigDict, target: Target) -> Sizing:
    """Compiles the training step of a config for a target, which takes as long as the compiler needs."""
    with cost.explained() as choices:
        made = ahead_of_time.trace(config, target.devices)
    training = made.config.training
    activations, _ = passes(made.config, made.architecture, target)
    activations //= batch_shards(made.mesh.shape) * training.microbatches
    try:
        compiled = made.compile()
    except JaxRuntimeError as error:
        program, used = None, _used(error)
    else:
        program = programs.read(compiled, made.mesh)
        used = program.memory.total
    kinds = _kinds(made, activations, used)
    tokens = training.batch_size * training.sequence_length
    executed = traced.products(made.traced.jaxpr.jaxpr)
    collectives = program.collectives if program else None
    return Sizing(
        target=target.name,
        devices=len(target.devices),
        mesh=dict(made.mesh.shape),
        remat=made.config.model.remat,
        microbatches=training.microbatches,
        parameters=made.architecture.num_parameters,
        memory=kinds,
        memory_limit=target.memory_bytes,
        memory_analysis=program.memory if program else None,
        flops=tokens * flops.training_flops_per_token(made.architecture.config, training.sequence_length),
        executed_flops=float(executed.flops),
        collectives=collectives,
        choices=tuple(choices),
        xla_seconds=program.seconds if program else None,
        xla_cycles=program.cycles if program else None,
        time=roofline.times(
            kind=target.devices[0].device_kind,
            dtype=made.config.model.dtype,
            mesh=dict(made.mesh.shape),
            flops=executed.flops / len(target.devices),
            bytes_=2 * (kinds.parameters + kinds.optimizer)
            + kinds.batch
            + 2 * training.microbatches * kinds.activations,
            collectives=collectives,
            flops_counted=executed.counted,
        ),
        tokens_a_step=tokens,
        steps=training.steps,
    )


def passes(config: config_dict.ConfigDict, architecture: Architecture, target: Target) -> tuple[int, int]:
    """For the whole batch on one device of the target's kind: the bytes that the forward pass leaves for the backward pass,
    besides the parameters; and the FLOPs of the products of both, with those in loops of unknown trip count counted
    once."""
    shape = config.training.batch_size, config.training.sequence_length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), tokens)
    objective = make_objective(config, architecture)

    def pullback(parameters, batch):
        weights = jnp.ones(shape, jnp.float32)
        total, pullback, _ = jax.vjp(lambda parameters: objective(parameters, batch, weights), parameters, has_aux=True)
        return pullback, total

    def gradient(parameters, batch):
        pull, total = pullback(parameters, batch)
        return pull(jnp.ones_like(total))

    # On one device kernels may be refused that take a device's part: the run's own program says which are not used.
    with backends.use_device(target.devices[0]), log_once.muted(), jax.numpy_dtype_promotion("standard"):
        forward = jax.make_jaxpr(lambda *given: pullback(*given)[0])(architecture.shapes, batch).jaxpr
        both = jax.make_jaxpr(gradient)(architecture.shapes, batch).jaxpr
    given = {id(x) for x in (*forward.invars, *forward.constvars)}
    kept = {id(x): x.aval for x in forward.outvars if isinstance(x, core.Var) and id(x) not in given}
    return cost.size_of(list(kept.values())), traced.products(both).flops


def batch_shards(mesh: Any) -> int:
    """The number of devices over which the tokens of a batch are spread."""
    return sharding.parts_on(mesh, "batch", "time")


def shard_bytes(tree: Any) -> int:
    """Bytes on one device of arrays with known placements."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def _kinds(made: ahead_of_time.TracedStep, activations: int, used: int) -> Kinds:
    parameters, state = shard_bytes(made.state.parameters), shard_bytes(made.state)
    tokens = made.config.training.batch_size * made.config.training.sequence_length
    batch = 3 * 4 * tokens // batch_shards(made.mesh.shape)  # tokens, targets and segment ids
    rest = max(0, used - state - batch)
    gradients = min(parameters, rest)
    activations = min(activations, rest - gradients)
    return Kinds(parameters, state - parameters, batch, gradients, activations, rest - gradients - activations)


def _used(error: JaxRuntimeError) -> int:
    """The bytes that a program would use according to libtpu, when it refuses the program for its memory."""
    if found := _OUT_OF_MEMORY.search(str(error)):
        number, unit = found[1] or found[3], found[2] or found[4] or " "
        return int(float(number) * 1024 ** " KMGT".index(unit))
    raise UserError(f"the compiler rejects the program: {str(error).splitlines()[0]}") from error
