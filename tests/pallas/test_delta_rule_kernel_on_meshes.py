"""The kernel of the delta rule on a mesh, interpreted: each device runs it on its part, with time whole and with time
spread."""

import functools

import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.pallas import blocks
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.shards import EIGHT, FOUR, IDS, TWO, T, make_mesh

B, H, K, V = 4, 2, 3, 5
SHAPES = {"scalar": (B, T, H), "channel": (B, T, H, K)}


@pytest.mark.parametrize(
    "sizes, decay, packed",
    [
        ({"data": 4, "tensor": 2}, "scalar", True),
        ({"fsdp": 4, "tensor": 2}, "none", False),
        (EIGHT, "scalar", True),
        (FOUR, "channel", True),
        (TWO, "none", True),
    ],
    ids=str,
)
def test_the_kernel_on_a_mesh(monkeypatch, sizes, decay, packed):
    monkeypatch.setattr(blocks, "_DELTA_RULE_TPU_ELSEWHERE", blocks.DeltaRuleBlock(16, 16, 1))
    random = np.random.default_rng(0)
    q, k, v, state = (random.standard_normal(s) for s in ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, H, K, V)))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = None if decay == "none" else -3 * random.uniform(0, 1, SHAPES[decay])
    inputs = q, k, v, random.uniform(0, 1, (B, T, H)), log_decay, state
    cotangents = random.standard_normal(v.shape), random.standard_normal(state.shape)
    mesh = make_mesh(sizes)
    results = []
    for module, backend in ((ops, "recurrent"), (operations, "pallas")):
        run = functools.partial(module.delta_rule, segment_ids=IDS if packed else None, backend=backend)
        with sharding.use_mesh(mesh):
            results.append(numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype="float64"))
    numerics.assert_close(results[1], numerics.wide(results[0]), 1e-12)
