"""Kimi Delta Attention: its parameters and their initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.mixers.kda import KimiDeltaAttention
from tests import numerics, oracles, small


def test_the_parameters():
    """2 heads with keys of 6 and values of 8; a decay for each of the 12 key channels."""
    _, parameters = small.module(lambda rngs: KimiDeltaAttention(small.config(key_width=6), rngs=rngs))
    widths = {"query": 12, "key": 12, "value": 16}
    assert jax.tree.map(np.shape, parameters) == {
        "inputs": {
            **{name: {"kernel": (16, width)} for name, width in widths.items()},
            **{f"{name}_convolution": {"convolution_kernel": (4, width)} for name, width in widths.items()},
            "beta": {"kernel": (16, 2)},
        },
        "decay": {"down": {"kernel": (16, 8)}, "up": {"kernel": (8, 12)}},
        "A_log": (2,),
        "dt_bias": (12,),
        "gate": {"down": {"kernel": (16, 8)}, "up": {"kernel": (8, 16)}},
        "norm": {"scale": (8,)},
        "out": {"kernel": (16, 16)},
    }
    config = small.config(key_width=6, gate_bias=True)
    _, parameters = small.module(lambda rngs: KimiDeltaAttention(config, rngs=rngs))
    assert parameters["gate"]["up"]["bias"].shape == (16,)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"^kda: 3 heads do not divide 16 channels"):
        KimiDeltaAttention(small.config(recurrent_heads=3), rngs=nnx.Rngs(0))


def test_the_parameters_at_the_start():
    """512 heads: A uniform in 1 .. 16; a time step for each of the 1,024 channels."""
    config = small.config(width=512, num_heads=512, key_width=2, value_width=64, num_layers=8)
    mixer = KimiDeltaAttention(config, rngs=nnx.Rngs(0))
    tenths = np.linspace(0.1, 0.9, 9)
    rate = np.exp(numerics.wide(mixer.A_log[...]))
    assert 1 < rate.min() < 1.2 and 15.8 < rate.max() <= 16 + 1e-5
    numerics.assert_close(np.quantile(rate, tenths), 1 + 15 * tenths, 0.07)
    dt = oracles.softplus(numerics.wide(mixer.dt_bias[...]))
    assert dt.shape == (1024,) and dt.min() > 1e-3 - 1e-8 and dt.max() < 0.1 + 1e-6
    numerics.assert_close(np.quantile(np.log10(dt), tenths), -3 + 2 * tenths, 0.03)
    for low_rank, scale in ((mixer.decay, 3**-0.5), (mixer.gate, 1)):
        assert np.std(low_rank.down.kernel[...]) == pytest.approx(512**-0.5, rel=0.05)
        assert np.std(low_rank.up.kernel[...]) == pytest.approx(scale * 64**-0.5, rel=0.05)


def test_the_outputs_at_the_start():
    """The gate is the sigmoid of numbers about as wide as a standard normal; its root mean square is 0.54."""
    mixer = KimiDeltaAttention(small.config(width=64, num_heads=4, num_layers=8), rngs=nnx.Rngs(0))
    y, _ = numerics.jit(mixer)(jax.random.normal(jax.random.key(1), (4, 32, 64)))
    assert float(jnp.std(y)) == pytest.approx(0.54 * (2 / 8) ** 0.5, rel=0.1)
