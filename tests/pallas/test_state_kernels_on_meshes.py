"""The kernels of linear attention and of the delta rule on a mesh, for TPU and for GPU, interpreted: each device runs them
on its part, with time whole or spread."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.ops import backends
from jaxlinear.pallas.parts.target import Target
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.shards import EIGHT, FOUR, IDS, TWO, T, make_mesh

B, H, K, V = 4, 2, 3, 5
DECAYS = {"none": None, "constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, K)}
ROWS = {"data": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}

CASES = [
    ("linear_attention", ROWS[0], "scalar", True),
    ("linear_attention", ROWS[1], "constant", False),
    ("linear_attention", FOUR, "channel", True),
    ("linear_attention", EIGHT, "scalar", True),
    ("linear_attention", TWO, "constant", True),
    ("linear_attention", TWO, "none", False),
    ("delta_rule", ROWS[0], "scalar", True),
    ("delta_rule", ROWS[1], "none", False),
    ("delta_rule", FOUR, "channel", True),
    ("delta_rule", EIGHT, "scalar", True),
    ("delta_rule", TWO, "none", True),
    ("updates", ROWS[0], "scalar", True),
    ("updates", TWO, "scalar", True),
]


@pytest.mark.slow(but_nth=2)
@pytest.mark.parametrize("operation, sizes, decay, packed", CASES, ids=str)
def test_the_kernel_on_a_mesh(short_chunks, operation, sizes, decay, packed):
    check(operation, sizes, decay, packed)


@pytest.mark.parametrize("operation, sizes, decay, packed", [CASES[i] for i in (2, 6, 9)], ids=str)
def test_the_gpu_kernel_on_a_mesh(monkeypatch, operation, sizes, decay, packed):
    monkeypatch.setattr(backends, "target", lambda: Target("gpu", "none", True))
    check(operation, sizes, decay, packed)


@pytest.mark.parametrize("sizes", [ROWS[0], FOUR], ids=str)
def test_negative_eigenvalues_on_a_mesh(short_chunks, sizes):
    """With keys that are alike in bfloat16: on each device's rows, and by the maps of parts of time. Kernels that are not
    told of negative eigenvalues are off by far more."""
    random = np.random.default_rng(0)
    q, v, one = (random.standard_normal(s) for s in ((B, T, H, 16), (B, T, H, 16), (B, 1, H, 16)))
    k = np.broadcast_to(one / np.linalg.norm(one, axis=-1, keepdims=True), q.shape)
    state, mesh = random.standard_normal((B, H, 16, 16)), make_mesh(sizes)
    given = *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), jnp.full((B, T, H), 2.0, jnp.float32)
    exact = numerics.wide(given)
    expected = numerics.run(
        functools.partial(ops.delta_rule, backend="recurrent"), *exact, None, state, dtype="float64"
    )
    errors = []
    for negative in (True, False):
        run = functools.partial(operations.delta_rule, backend="pallas", negative_eigenvalues=negative)
        with sharding.use_mesh(mesh):
            found = numerics.jit(run)(*given, None, jnp.asarray(state, jnp.float32))
        pairs = zip(numerics.wide(found), numerics.wide(expected), strict=True)
        errors.append([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs])
    assert max(errors[0]) < 0.02 and max(errors[1]) > 2 * max(errors[0]), errors


def check(operation, sizes, decay, packed):
    random = np.random.default_rng(0)
    operation, updates = ("delta_rule", (2,)) if operation == "updates" else (operation, ())
    shapes = (B, T, H, K), (B, T, H, *updates, K), (B, T, H, *updates, V), (B, H, K, V), (B, T, H, V)
    q, k, v, state, d_o = (random.standard_normal(s) for s in shapes)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta = (random.uniform(0, 1, (B, T, H, *updates)),) if operation == "delta_rule" else ()
    log_decay = None if decay == "none" else -3 * random.uniform(0, 1, DECAYS[decay])
    inputs = q, k, v, *beta, log_decay, state
    cotangents = d_o, random.standard_normal(state.shape)
    mesh = make_mesh(sizes)
    results = []
    for module, backend in ((ops, "recurrent"), (operations, "pallas")):
        options = {"scale": 0.7, "segment_ids": IDS if packed else None, "backend": backend}
        run = functools.partial(getattr(module, operation), **options)
        with sharding.use_mesh(mesh):
            results.append(numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype="float64"))
    numerics.assert_close(results[1], numerics.wide(results[0]), 1e-12)
