"""What the gradients of kernels share, and the refusal of unsupported ones: of gradients, and of a run's map."""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxlinear.errors import UserError


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def once(tree: Any, instead: str = "chunked") -> Any:
    """The tree unchanged: what the gradient rules of a kernel pass to kernels, forward and backward. To differentiate it,
    in either mode, is to differentiate the gradient, and raises ``UserError``.

    Args:
      tree: of arrays.
      instead: the backend that has gradients of gradients; operations without chunks have another than the default.
    """
    return tree


@once.defjvp
def _refuse(instead, primals, tangents):
    raise UserError(f"the kernel (backend='pallas') has no second derivatives; use backend={instead!r}")


def as_arrays(cotangents: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """The cotangents given to a rule with ``symbolic_zeros``, with those known to be zero as arrays too."""
    return tuple(jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in cotangents)


def refuse_that_of_a_map(*_: Any) -> NoReturn:
    """The backward rule of a kernel's ``summary``: a run is differentiated through its outputs and the state after it."""
    raise UserError("the kernel has no gradient for the map of a run; differentiate its outputs or the state after it")
