"""Retention: its decays and its norm."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.retention import Retention
from jaxlinear.parallel import operations
from tests import numerics, small


def test_the_decays(monkeypatch):
    """1 - 1/32, 1 - 1/64, ...; the last of 16 heads is still distinct from 1."""
    decays = []

    def attend(q, k, v, log_decay, *arguments, **options):
        decays.append(log_decay)
        return v, None

    monkeypatch.setattr(operations, "linear_attention", attend)
    mixer = Retention(small.config(dtype="bfloat16", recurrent_heads=16), rngs=nnx.Rngs(0))
    mixer(jnp.ones((1, 1, 16), jnp.bfloat16))
    expected = [1 / 2 ** (5 + h) for h in range(16)]
    numerics.assert_close(-jnp.expm1(decays[0]), np.array(expected), 1e-6)
    assert -np.expm1(np.float64(decays[0][-1])) == pytest.approx(2**-20, rel=1e-5)


def test_what_is_seen_depends_on_the_distance_alone():
    """The same two tokens, far along a row, after tokens of another document."""
    config = small.config(rotary_fraction=1.0)
    graph, parameters = small.module(lambda rngs: Retention(config, rngs=rngs))
    mixer = nnx.merge(graph, numerics.cast(parameters, "float32"))
    x = numerics.cast(numerics.normal(np.random.default_rng(0), 1, 2, 16), "float32")
    row = jnp.concatenate([jnp.zeros((1, 700, 16)), x], axis=1)
    ids = np.array([[0] * 700 + [1] * 2], np.int32)
    numerics.assert_close(numerics.jit(mixer)(row, segment_ids=ids)[0][:, -2:], mixer(x)[0], 1e-4)
