"""What a kernel of the delta rule is built for and what it is given."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear.pallas.plan import Named


class Arguments(NamedTuple):
    """``[B, T, H, K]`` is given as ``[B, T, H K]``, which moves nothing. States are ``[B, H, V, K]``."""

    k: jax.Array  # [B, T, H K]
    beta: jax.Array  # [B, T, H]
    state: jax.Array  # before the first step taken
    q: Any = None  # [B, T, H K], but in the summary
    v: Any = None  # [B, T, H V], but in the gradient of the state alone
    log_decay: Any = None  # [B, T, H] or [B, T, H K]
    starts: Any = None  # [B, T] bool
    d_o: Any = None  # [B, T, H V], in the backward pass
    before: Any = None  # [B, N, H, V, K], the states before each chunk, in the backward pass


@dataclasses.dataclass(frozen=True)
class Plan(Named):
    """One kernel.

    Attributes:
      kind: "forward", "summary", "gradient" or "state_gradient".
      length, heads, keys, values: T, H, K and V.
      decay: "none", "scalar" or "channel".
      packed: whether documents begin within rows.
      scale: of the outputs.
      narrow, wide: the dtypes of products, and of states and sums.
      chunk: tokens of a chunk, or None: by the table of ``blocks``.
      keep: forward, also the states before each chunk.
      negative_eigenvalues: whether beta |k|^2 goes beyond 1.
    """

    OPERATION: ClassVar[str] = "delta_rule"

    kind: str
    length: int
    heads: int
    keys: int
    values: int
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
        """As how many arrays of the dtype of products the kernel has the inverse, and what that and the states are
        multiplied by. Where eigenvalues are negative and keys alike, the numbers of a column of the inverse, and what one
        token after the other writes, are of one size and of either sign: of their sums 8 digits leave nothing."""
        return 2 if self.negative_eigenvalues and self.narrow != self.wide else 1

    @property
    def terms_of_decays(self) -> int:
        """On GPU the same of the gradients of products of keys: those of the decays of heads are small differences of their
        sums."""
        return self.terms if self.decay == "scalar" else 1

    def products(self, chunk: int) -> int:
        """Floating point operations of the products of matrices of a token and head; the inverse is not counted."""
        keys, values, state = 2 * chunk * self.keys, 2 * chunk * self.values, 2 * self.keys * self.values
        return {
            "forward": 2 * keys + 2 * values + 3 * state,
            "summary": keys * 2 + values + 2 * state + 4 * self.keys**2,
            "gradient": 6 * keys + 5 * values + 7 * state,
            "state_gradient": 2 * keys + 2 * values + 3 * state,
        }[self.kind]


def size_of(tree: Any) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
