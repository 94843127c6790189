"""Gated linear attention: its the initial decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.gla import GLA
from jaxlinear.parallel import operations
from tests import small


def test_the_decays(monkeypatch):
    """About 0.5^(1/16) at the start, and in float32 whatever dtype the activations have."""
    decays = []

    def attend(q, k, v, log_decay, *arguments, **options):
        decays.append(log_decay)
        return v, None

    monkeypatch.setattr(operations, "linear_attention", attend)
    mixer = GLA(small.config(width=256, num_heads=4, dtype="bfloat16"), rngs=nnx.Rngs(0))
    mixer(jax.random.normal(jax.random.key(0), (2, 50, 256), jnp.bfloat16))
    assert decays[0].dtype == jnp.float32 and decays[0].shape == (2, 50, 4, 32)
    assert float(jnp.exp(decays[0]).mean()) == pytest.approx(0.5 ** (1 / 16), abs=1e-3)
    assert float(jnp.exp(decays[0]).min()) > 0.9 and float(jnp.exp(decays[0]).max()) < 0.99
    mixer.decay_out.kernel[...] *= 0
    mixer.decay_out.bias[...] += 9.01  # not exact in bfloat16
    mixer(jnp.ones((1, 1, 256), jnp.bfloat16))
    expected = np.log(1 / (1 + np.exp(-9.01))) / 16
    assert np.asarray(decays[1], np.float64) == pytest.approx(np.full((1, 1, 4, 32), expected), rel=1e-4)
