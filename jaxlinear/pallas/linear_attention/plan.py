"""The specification, arguments and outputs of a linear attention kernel: the same on TPU and GPU."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax

from jaxlinear.pallas.parts.plan import Named


class Arguments(NamedTuple):
    """``[B, T, H, K]`` is given as ``[B, T, H K]``, which moves no data. States are ``[B, H, V, K]``."""

    keys: Any  # [B, T, H K], [B, T, K] if shared; for the gradient of the state alone, the queries
    values: Any  # [B, T, H V]; for the gradient of the state alone, the gradient of o
    state: jax.Array  # before the first step taken
    queries: Any = None  # shaped like keys, if there are outputs in time
    d_o: Any = None  # [B, T, H V], in the backward pass
    before: Any = None  # [B, N, H, V, K], the states before each block of time, in the backward pass
    log_decay: Any = None  # [H], [B, T, H] or [B, T, H K]
    starts: Any = None  # [B, T] bool


@dataclasses.dataclass(frozen=True)
class Plan(Named):
    """One kernel.

    Attributes:
      kind: "forward", "summary", "gradient" or "state_gradient".
      decay: "none", "constant", "scalar" or "channel".
      scale: of the outputs.
      chunk: tokens of a chunk; None: by the table in ``blocks``.
      keep: forward, also give the states before each block of time.
      shared: whether all heads have the same queries and keys; not with decays by channel.
      length, narrow, wide: T, and the dtypes of products, and of states and sums; for GPU.
    """

    OPERATION: ClassVar[str] = "linear_attention"

    kind: str
    heads: int
    key_width: int
    value_width: int
    decay: str
    packed: bool
    scale: float
    chunk: int | None = None
    keep: bool = False
    shared: bool = False
    length: int = 0
    narrow: Any = None
    wide: Any = None

    @property
    def side_by_side(self) -> tuple[int, ...]:
        """The channels per head of the arrays in time: K and V, or V alone."""
        return (self.value_width,) if self.shared else (self.key_width, self.value_width)

    @property
    def by_head(self) -> bool:
        return self.decay in ("constant", "scalar")

    def products(self, chunk: int) -> int:
        """Floating point operations of the matrix products per token and head, in the chunked form."""
        inner, outer = 2 * chunk, 2 * self.key_width * self.value_width
        both = self.key_width + self.value_width
        return {
            "forward": inner * both + 2 * outer,
            "gradient": inner * (3 * self.key_width + 2 * self.value_width) + 4 * outer,
        }.get(self.kind, outer)
