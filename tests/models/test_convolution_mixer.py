"""Based's gated convolution: its parameters, their initial values, and how far it sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.convolution import Convolution
from tests import small


def test_the_parameters():
    """As published, the maps have biases whatever ``bias`` says; the convolution has none."""
    config = small.config(recurrent_width=32, convolution_width=3, bias=False)
    _, parameters = small.module(lambda rngs: Convolution(config, rngs=rngs))
    assert jax.tree.map(np.shape, parameters) == {
        "input": {"kernel": (16, 32), "bias": (32,)},
        "gate": {"kernel": (16, 32), "bias": (32,)},
        "convolution": {"convolution_kernel": (3, 32)},
        "out": {"kernel": (32, 16), "bias": (16,)},
    }


def test_the_parameters_at_the_start():
    config = small.config(width=256, recurrent_width=512, num_layers=8, convolution_width=3)
    mixer = Convolution(config, rngs=nnx.Rngs(0))
    assert np.std(mixer.input.kernel[...]) == pytest.approx(256**-0.5, rel=0.05)
    assert np.std(mixer.gate.kernel[...]) == pytest.approx(256**-0.5, rel=0.05)
    assert np.std(mixer.out.kernel[...]) == pytest.approx((2 / 8 / 512) ** 0.5, rel=0.05)
    filters = np.asarray(mixer.convolution.convolution_kernel[...])  # uniform within 3**-0.5
    assert np.abs(filters).max() <= 3**-0.5 and np.std(filters) == pytest.approx(1 / 3, rel=0.05)
    for bias in (mixer.input.bias, mixer.gate.bias, mixer.out.bias):
        assert not bias[...].any()


def test_it_sees_as_many_tokens_as_its_width():
    mixer = Convolution(small.config(convolution_width=3), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 16)), jnp.float32)
    run = jax.jit(lambda x: mixer(x)[0])
    changed = jnp.any(run(x) != run(x.at[:, 4].add(1.0)), axis=-1)[0]
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False] * 2
