"""The kernels of linear attention and of the delta rule on a mesh, those for TPU and those for GPU, interpreted: each
device runs them on its part, with time whole and with time spread."""

import functools

import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.ops import backends
from jaxlinear.pallas import blocks
from jaxlinear.pallas.target import Target
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.shards import EIGHT, FOUR, IDS, TWO, T, make_mesh

B, H, K, V = 4, 2, 3, 5
DECAYS = {"none": None, "constant": (H,), "scalar": (B, T, H), "channel": (B, T, H, K)}
ROWS = {"data": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_LINEAR_ATTENTION_TPU_ELSEWHERE", (blocks.AttentionBlock(16, 16, 1),) * 2)
    monkeypatch.setattr(blocks, "_DELTA_RULE_TPU_ELSEWHERE", blocks.DeltaRuleBlock(16, 16, 1))


CASES = [
    ("linear_attention", ROWS[0], "scalar", True),
    ("linear_attention", ROWS[1], "constant", False),
    ("linear_attention", EIGHT, "scalar", True),
    ("linear_attention", FOUR, "channel", True),
    ("linear_attention", TWO, "constant", True),
    ("linear_attention", TWO, "none", False),
    ("delta_rule", ROWS[0], "scalar", True),
    ("delta_rule", ROWS[1], "none", False),
    ("delta_rule", EIGHT, "scalar", True),
    ("delta_rule", FOUR, "channel", True),
    ("delta_rule", TWO, "none", True),
    ("updates", ROWS[0], "scalar", True),
    ("updates", TWO, "scalar", True),
]


@pytest.mark.parametrize("operation, sizes, decay, packed", CASES, ids=str)
def test_the_kernel_on_a_mesh(small_blocks, operation, sizes, decay, packed):
    check(operation, sizes, decay, packed)


@pytest.mark.parametrize("operation, sizes, decay, packed", [CASES[i] for i in (3, 6, 8)], ids=str)
def test_the_gpu_kernel_on_a_mesh(monkeypatch, operation, sizes, decay, packed):
    monkeypatch.setattr(backends, "target", lambda: Target("gpu", "none", True))
    check(operation, sizes, decay, packed)


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
