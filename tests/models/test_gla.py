"""Gated linear attention: its parameters, their initial values, and the initial decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.mixers.gla import GLA
from jaxlinear.parallel import operations
from tests import small


def test_the_parameters():
    """2 heads: K = D / 2 / H, V = D / H."""
    _, parameters = small.module(lambda rngs: GLA(small.config(), rngs=rngs))
    assert jax.tree.map(np.shape, parameters) == {
        "query": {"kernel": (16, 8)},
        "key": {"kernel": (16, 8)},
        "value": {"kernel": (16, 16)},
        "decay_in": {"kernel": (16, 16)},
        "decay_out": {"kernel": (16, 8), "bias": (8,)},
        "gate": {"kernel": (16, 16)},
        "norm": {"scale": (8,)},
        "out": {"kernel": (16, 16)},
    }


def test_the_widths():
    for given, shape in {(0, 0, 0): (2, 4, 8), (4, 0, 0): (4, 2, 4), (3, 5, 7): (3, 5, 7), (3, 0, 0): None}.items():
        names = ("recurrent_heads", "key_width", "value_width")
        config = small.config(**dict(zip(names, given, strict=True)))
        if shape is None:
            with pytest.raises(
                UserError, match=r"^gla: 3 heads do not divide 8 channels; change model.recurrent_heads"
            ):
                GLA.widths(config)
        else:
            assert GLA.widths(config) == shape
    with pytest.raises(UserError, match=r"^gla: 1 heads do not divide 0 channels"):  # half of 1
        GLA.widths(small.config(width=1, num_heads=1))
    mixer = GLA(small.config(recurrent_heads=3, key_width=5, value_width=7), rngs=nnx.Rngs(0))
    assert mixer.init_state(6)["memory"].shape == (6, 3, 5, 7)


def test_the_parameters_at_the_start():
    mixer = GLA(small.config(width=256, num_heads=4, num_layers=8), rngs=nnx.Rngs(0))
    deviations = {
        "query": (2**-5 * 2 / (256 + 128)) ** 0.5,
        "key": (2**-5 * 2 / (256 + 128)) ** 0.5,
        "decay_in": (2**-5 * 2 / (256 + 16)) ** 0.5,
        "decay_out": (2**-5 * 2 / (16 + 128)) ** 0.5,
        "value": 256**-0.5,
        "gate": 256**-0.5,
        "out": (2 / 8 / 256) ** 0.5,
    }
    for name, deviation in deviations.items():
        kernel = getattr(mixer, name).kernel[...]
        assert np.std(kernel) == pytest.approx(deviation, rel=0.05), name
        if name in ("query", "key", "decay_in", "decay_out"):
            assert np.abs(kernel).max() == pytest.approx(3**0.5 * deviation, rel=0.02), name  # uniform
    assert not mixer.decay_out.bias[...].any() and not mixer.norm.scale[...].any()


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
