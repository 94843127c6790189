"""DeltaNet: its its keys of unit length."""

import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.delta_net import DeltaInputs
from tests import numerics, small


def test_no_eigenvalue_lies_beyond_minus_one():
    """Keys are rounded to bfloat16, to lengths above and below 1, and beta is 2 to float32 accuracy."""
    config = small.config(dtype="bfloat16", negative_eigenvalues=True, householders=2)
    graph, parameters = small.module(lambda rngs: DeltaInputs(config, 2, 8, 8, rngs=rngs))
    parameters["beta"]["kernel"] = np.full((16, 4), 50.0)
    x = numerics.cast(abs(numerics.normal(np.random.default_rng(1), 1, 64, 16)), "bfloat16")
    run = numerics.jit(lambda parameters, x: nnx.merge(graph, parameters)(x, segment_ids=None, past={})[0])
    _, k, _, beta = run(numerics.cast(parameters, "float32"), x)
    square = np.sum(np.asarray(k, np.float64) ** 2, axis=-1)
    assert square.min() < 0.999 and square.max() > 1.001
    eigenvalues = 1 - np.asarray(beta) * square
    assert eigenvalues.min() == pytest.approx(-1, abs=1e-6)
