"""The specification and the arguments of a delta rule kernel."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.pallas.parts.plan import Named


class Arguments(NamedTuple):
    """``[B, T, H, K]`` is given as ``[B, T, H K]``, which moves no data. States are ``[B, H, V, K]``."""

    k: jax.Array  # [B, T, H K]
    beta: jax.Array  # [B, T, H]
    state: jax.Array  # before the first step taken
    q: Any = None  # [B, T, H K], except in the summary
    v: Any = None  # [B, T, H V], except in the gradient of the state alone
    log_decay: Any = None  # [B, T, H] or [B, T, H K]
    starts: Any = None  # [B, T] bool
    d_o: Any = None  # [B, T, H V], in the backward pass
    before: Any = None  # [B, N, H, V, K], the states before each chunk, in the backward pass


@dataclasses.dataclass(frozen=True)
class Plan(Named):
    """One kernel.

    Attributes:
      kind: "forward", "summary", "gradient" or "state_gradient".
      length, heads, key_width, value_width: T, H, K and V.
      decay: "none", "scalar" or "channel".
      packed: whether documents begin within rows.
      scale: of the outputs.
      narrow, wide: the dtypes of products, and of states and sums.
      chunk: tokens of a chunk; None: by the table in ``blocks``.
      keep: forward, also give the states before each chunk.
      negative_eigenvalues: whether beta |k|^2 may exceed 1.
    """

    OPERATION: ClassVar[str] = "delta_rule"

    kind: str
    length: int
    heads: int
    key_width: int
    value_width: int
    decay: str
    packed: bool
    scale: float
    narrow: Any
    wide: Any
    chunk: int | None = None
    keep: bool = False
    negative_eigenvalues: bool = False

    @property
    def terms(self) -> int:
        """How many arrays of the products' dtype represent the inverse, and what it and the states are multiplied by. With
        negative eigenvalues and similar keys, the numbers in a column of the inverse, and the successive writes of tokens,
        have one magnitude and either sign: with 8 digits nothing is left of their sums."""
        return 2 if self.negative_eigenvalues and self.narrow != self.wide else 1

    @property
    def terms_of_decays(self) -> int:
        """The same on GPU for the gradients of products of keys: those of head decays are small differences of sums."""
        return self.terms if self.decay == "scalar" else 1

    def products(self, chunk: int) -> int:
        """Floating point operations of the matrix products per token and head, not counting the inverse."""
        keys, values = 2 * chunk * self.key_width, 2 * chunk * self.value_width
        state = 2 * self.key_width * self.value_width
        return {
            "forward": 2 * keys + 2 * values + 3 * state,
            "summary": keys * 2 + values + 2 * state + 4 * self.key_width**2,
            "gradient": 6 * keys + 5 * values + 7 * state,
            "state_gradient": 2 * keys + 2 * values + 3 * state,
        }[self.kind]


def size_of(tree: Any) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
