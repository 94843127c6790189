"""The operations take NumPy arrays, outside jit as well, and return the same as for JAX arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops

IDS = np.array([[1, 1, 1, 2, 2]], np.int32)


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


CALLS = {
    "linear_recurrence": (ops.linear_recurrence, [draw(1, 5, 3), draw(1, 5, 3), draw(1, 3)], {}),
    "constant": (ops.linear_recurrence, [draw(3), draw(1, 5, 3)], {"reverse": True}),
    "sliding_window": (
        ops.sliding_window_attention,
        [draw(1, 5, 2, 4), draw(1, 5, 1, 4), draw(1, 5, 1, 4)],
        {"window": 2},
    ),
    "attention": (ops.causal_attention, [draw(1, 5, 2, 4), draw(1, 5, 1, 4), draw(1, 5, 1, 4)], {}),
    "linear_attention": (
        ops.linear_attention,
        [draw(1, 5, 2, 4), draw(1, 5, 2, 4), draw(1, 5, 2, 3), -abs(draw(1, 5, 2)), draw(1, 2, 4, 3)],
        {"chunk_size": 2},
    ),
    "convolution": (ops.causal_convolution, [draw(1, 5, 3), draw(4, 3), draw(3), draw(1, 3, 3)], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_numpy_arrays_are_taken(name):
    op, arrays, options = CALLS[name]
    got = op(*arrays, segment_ids=IDS, **options)
    want = op(*map(jnp.asarray, arrays), segment_ids=jnp.asarray(IDS), **options)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
