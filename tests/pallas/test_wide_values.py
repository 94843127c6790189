"""Values wider than one kernel takes are split over several: results do not change, and nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.ops import matrix_states
from tests import numerics

B, T, H, K, V = 2, 20, 2, 8, 16
IDS = np.repeat([[0, 1, 2]], [7, 6, 7], axis=1).astype(np.int32).repeat(B, axis=0)


def inputs(operation):
    random = np.random.default_rng(0)
    found = {name: random.standard_normal((B, T, H, n)) for name, n in (("q", K), ("k", K), ("v", V))}
    found["k"] /= np.linalg.norm(found["k"], axis=-1, keepdims=True)
    if operation == "delta_rule":
        found["beta"] = random.random((B, T, H))
    found["log_decay"] = -random.random((B, T, H, K))
    found["initial_state"] = random.standard_normal((B, H, K, V))
    return found


def values_and_gradients(operation, backend):
    def objective(given):
        o, final = getattr(ops, operation)(**given, segment_ids=IDS, backend=backend)
        weighed = jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)) + jnp.sum(final**2)
        return weighed, (o, final)

    (_, found), gradients = numerics.jit(jax.value_and_grad(objective, has_aux=True))(inputs(operation))
    return found, gradients


@pytest.mark.parametrize("operation", ["linear_attention", "delta_rule"])
def test_two_kernels_share_the_values(operation, short_chunks, monkeypatch):
    monkeypatch.setattr(matrix_states, "WIDEST", 8)
    assert matrix_states.value_pieces(V, 8) == 2
    with jax.enable_x64(True):
        numerics.assert_close(
            values_and_gradients(operation, "pallas"), values_and_gradients(operation, "recurrent"), 1e-10
        )


@pytest.mark.parametrize("width, pieces", [(16, 1), (512, 1), (400, 1), (521, None), (1024, 2), (1280, 4), (1536, 3)])
def test_pieces(width, pieces):
    assert matrix_states.value_pieces(width, 2) == pieces
    if width < 512:
        assert matrix_states.value_pieces(2 * width, 4) == matrix_states.value_pieces(4 * width, 2)
