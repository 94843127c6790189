"""The refusal of what kernels do not have: derivatives of their gradients."""

import functools
from typing import Any

import jax

from jaxlinear.errors import UserError


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def once(tree: Any, instead: str = "chunked") -> Any:
    """The tree as it is: what the rules of a kernel's gradient hand to kernels, forward and backward. To differentiate it
    is to differentiate the gradient, in either mode, and raises ``UserError``.

    Args:
      tree: of arrays.
      instead: the backend that has gradients of gradients, as all but the diagonal recurrence call it.
    """
    return tree


@once.defjvp
def _refuse(instead, primals, tangents):
    raise UserError(f"the kernel has no gradients of gradients (backend='pallas'); backend={instead!r} has them")
