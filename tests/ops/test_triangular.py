"""Small triangular systems against NumPy's solver, their gradients, and systems whose power series grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import triangular
from tests import numerics


def draw(length, seed=0):
    random = np.random.default_rng(seed)
    lower = np.tril(random.standard_normal((2, 3, length, length)), -1) / np.sqrt(length)
    return lower, tuple(random.standard_normal((2, 3, length, n)) for n in (4, 2))


def library(lower, right):
    whole = jnp.eye(lower.shape[-1], dtype=lower.dtype)[None, None] + jnp.tril(lower, -1)
    return tuple(jax.scipy.linalg.solve_triangular(whole, r, lower=True) for r in right)


# One block, part of one, and several, whose number is a power of two or not.
@pytest.mark.parametrize("length", [1, 5, 8, 20, 32])
def test_values_and_gradients(length):
    lower, right = draw(length)
    cotangents = tuple(np.cos(np.arange(r.size)).reshape(r.shape) for r in right)
    expected = numerics.run(numerics.with_gradients(library), (lower, right), cotangents, dtype="float64")
    whole = np.eye(length) + lower
    numerics.assert_close(expected[0], tuple(np.linalg.solve(whole, r) for r in right), 1e-12)
    for dtype in ("float64", "float32"):
        run = numerics.with_gradients(triangular.solve)
        found = numerics.run(run, (lower, right), cotangents, dtype=dtype)
        numerics.assert_close(found, numerics.wide(expected), {"float64": 1e-12, "float32": 1e-6}[dtype])


def test_equal_rows_are_solved_exactly():
    """The system of tokens with one unit key and beta = 2. Powers of ``lower`` exceed 2**64; the solution is 1 and -1."""
    lower = 2 * np.tril(np.ones((64, 64)), -1)
    (found,) = numerics.run(numerics.jit(triangular.solve), lower, (np.ones((64, 1)),), dtype="float32")
    assert found[:, 0].tolist() == [1.0, -1.0] * 32
