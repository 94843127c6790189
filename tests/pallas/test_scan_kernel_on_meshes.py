"""The scan kernel on a mesh, interpreted: each device runs it on its part, with time whole or spread."""

import functools

import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.ops import backends
from jaxlinear.pallas.parts.target import Target
from jaxlinear.parallel import operations, sharding
from tests import numerics
from tests.shards import make_mesh

B, T = 4, 32
IDS = np.stack([np.repeat([0, 1, 2], [3, 25, 4]), np.repeat([0, 1, 2], [8, 8, 16]), np.arange(T), np.zeros(T, int)])


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize(
    "sizes, kind, packed, reverse",
    [
        ({"data": 4, "tensor": 2}, "in time", True, True),
        ({"fsdp": 2, "tensor": 4}, "constant", False, False),
        ({"data": 2, "sequence": 4}, "in time", True, False),
        ({"sequence": 2, "tensor": 2, "data": 2}, "complex constant", True, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_kernel_on_a_mesh(monkeypatch, small_blocks, platform, sizes, kind, packed, reverse):
    monkeypatch.setattr(backends, "target", lambda: Target(platform, "none", True))
    random = np.random.default_rng(0)
    shape = (8,) if "constant" in kind else (B, T, 8)
    complex_ = "complex" in kind
    a = random.uniform(0, 1, shape) * (np.exp(1j * random.uniform(0, 6, shape)) if complex_ else 1)
    x, state = (numerics.normal(random, *s, complex_=complex_) for s in ((B, T, 8), (B, 8)))
    cotangents = tuple(numerics.normal(random, *y.shape, complex_=complex_) for y in (x, state))
    mesh = make_mesh(sizes)
    results = []
    for module, backend in ((ops, "recurrent"), (operations, "pallas")):
        options = {"segment_ids": IDS.astype(np.int32) if packed else None, "reverse": reverse, "backend": backend}
        run = functools.partial(module.linear_recurrence, **options)
        with sharding.use_mesh(mesh):
            results.append(numerics.run(numerics.with_gradients(run), (a, x, state), cotangents, dtype="float64"))
    numerics.assert_close(results[1], numerics.wide(results[0]), 1e-12)
