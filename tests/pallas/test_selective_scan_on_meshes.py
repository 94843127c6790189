"""The selective scan's kernel on a mesh, interpreted: each device runs it on its part, with time whole or spread."""

import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.ops import backends
from jaxlinear.pallas.parts.target import Target
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.shards import make_mesh

B, T, D, N = 4, 32, 8, 3
IDS = np.stack([np.repeat([0, 1, 2], [3, 25, 4]), np.repeat([0, 1, 2], [8, 8, 16]), np.arange(T), np.zeros(T, int)])


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize(
    "sizes, with_rates, packed",
    [
        ({"data": 4, "tensor": 2}, True, True),
        ({"fsdp": 2, "tensor": 4}, False, False),
        ({"data": 2, "sequence": 4}, True, True),
        ({"sequence": 2, "tensor": 2, "data": 2}, False, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_kernel_on_a_mesh(monkeypatch, small_blocks, platform, sizes, with_rates, packed):
    monkeypatch.setattr(backends, "target", lambda: Target(platform, "none", True))
    random = np.random.default_rng(0)
    x, k, q = (numerics.normal(random, B, T, width) for width in (D, N, N))
    dt = random.uniform(0, 1, x.shape) / (1 + np.sum(k**2, axis=-1, keepdims=True))
    rates = (-random.uniform(0, 3, (D, N)),) if with_rates else ()
    inputs = (x, dt, k, q, numerics.normal(random, B, D, N), *rates)
    cotangents = numerics.normal(random, *x.shape), numerics.normal(random, B, D, N)
    results = []
    for module, backend in ((ops, "recurrent"), (operations, "pallas")):
        options = {"segment_ids": IDS.astype(np.int32) if packed else None, "backend": backend}

        def run(x, dt, k, q, state, *rates, module=module, options=options):
            return module.selective_scan(x, dt, rates[0] if rates else None, k, q, state, **options)

        with sharding.use_mesh(make_mesh(sizes)):
            results.append(numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype="float64"))
    numerics.assert_close(results[1], numerics.wide(results[0]), 1e-12)
