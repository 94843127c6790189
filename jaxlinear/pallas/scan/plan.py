"""The specification, arguments and outputs of a scan kernel: the same on TPU and GPU."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxlinear.pallas.parts.complex_parts import Parts


class Arguments(NamedTuple):
    a: Parts  # [B, T, D], or [1, 1, D] constant in time
    x: Parts  # [B, T, D]; for a lagged scan, the gradient of h
    state: Parts  # [B, D], before the first step taken
    starts: Any = None  # [B, T] bool, where the state before the step is forgotten; or None
    h: Parts = ()  # [B, T, D], if the gradient of a is wanted
    before: Parts = ()  # [B, D], the predecessor of the first h


@dataclasses.dataclass(frozen=True)
class Plan:
    """One scan.

    Attributes:
      parts: 1 for real numbers, 2 for complex ones.
      reverse: from the last step to the first.
      lagged: the scan of the gradients, ``c_t = a_t g_t`` with ``g_t = x_t + c_{t+1}``, where t+1 is the step taken
        before; its outputs in time are g, and its final state is c. Otherwise ``h_t = a_t h_{t-1} + x_t``.
      emit: whether it has outputs in time and, if lagged, the gradient of a. Otherwise it gives the product of all a.
      constant: a is constant in time; its gradient is given as sums.
      packed: with ``starts``.
    """

    parts: int
    reverse: bool
    lagged: bool
    emit: bool
    constant: bool
    packed: bool

    @property
    def with_h(self) -> bool:
        return self.lagged and self.emit

    @property
    def name(self) -> str:
        kinds = ("gradient", "state_gradient") if self.lagged else ("forward", "summary")
        kind = kinds[0] if self.emit else kinds[1]
        marks = [mark for mark in ("reverse", "constant", "packed") if getattr(self, mark)]
        return "_".join(["scan", kind, *(["complex"] if self.parts == 2 else []), *marks])

    def outputs(self, arguments: Arguments, sums: int) -> list[tuple[jax.ShapeDtypeStruct, str]]:
        """Shapes, and where the arrays lie: y and the gradient of a, or the product of a; and the last state."""
        (batch, _, width), state = arguments.x[0].shape, arguments.state[0].dtype
        per_row = jax.ShapeDtypeStruct((batch, 1, width), state), "per_row"
        outputs = []
        if self.emit:
            outputs += [(jax.ShapeDtypeStruct(x.shape, x.dtype), "in_time") for x in arguments.x]
        if self.with_h:
            for a in arguments.a:
                if self.constant:
                    outputs.append((jax.ShapeDtypeStruct((batch, sums, width), state), "sums"))
                else:
                    outputs.append((jax.ShapeDtypeStruct(a.shape, a.dtype), "in_time"))
        elif not self.emit:
            outputs += [per_row] * self.parts
        return outputs + [per_row] * self.parts

    def cost(self, arguments: Arguments, outputs) -> pl.CostEstimate:
        arrays = [*jax.tree.leaves(arguments), *(shape for shape, _ in outputs)]
        size = arguments.x[0].size
        operations = (4 if self.with_h else 2) * (4 if self.parts == 2 else 1)
        return pl.CostEstimate(
            flops=operations * size,
            transcendentals=0,
            bytes_accessed=sum(y.size * jnp.dtype(y.dtype).itemsize for y in arrays),
        )
