"""Gated DeltaNet: its parameters and their initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.errors import UserError
from jaxlinear.models.mixers.gated_delta_net import GatedDeltaNet
from tests import numerics, oracles, small


def test_the_parameters():
    """2 heads with keys of 6 and values of 12: K = 3/4 D / H, V = 2 K."""
    _, parameters = small.module(lambda rngs: GatedDeltaNet(small.config(), rngs=rngs))
    widths = {"query": 12, "key": 12, "value": 24}
    assert jax.tree.map(np.shape, parameters) == {
        "inputs": {
            **{name: {"kernel": (16, width)} for name, width in widths.items()},
            **{f"{name}_convolution": {"convolution_kernel": (4, width)} for name, width in widths.items()},
            "beta": {"kernel": (16, 2)},
        },
        "decay": {"kernel": (16, 2)},
        "A_log": (2,),
        "dt_bias": (2,),
        "gate": {"kernel": (16, 24)},
        "norm": {"scale": (12,)},
        "out": {"kernel": (24, 16)},
    }
    without = small.module(lambda rngs: GatedDeltaNet(small.config(output_gate="none"), rngs=rngs))[1]
    assert parameters.keys() - without.keys() == {"gate"} and without.keys() < parameters.keys()


@pytest.mark.parametrize("given, expected", [({"key_width": 5}, (5, 10)), ({"value_width": 5}, (6, 5))], ids=str)
def test_the_widths_that_are_given(given, expected):
    mixer = nnx.eval_shape(lambda: GatedDeltaNet(small.config(**given), rngs=nnx.Rngs(0)))
    assert mixer.init_state(7)["memory"].shape == (7, 2, *expected)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"^gated_delta_net: 5 heads do not divide 12 channels"):
        GatedDeltaNet(small.config(recurrent_heads=5), rngs=nnx.Rngs(0))


def test_the_parameters_at_the_start():
    """512 heads: A uniform in 0 .. 16, the time step log-uniform in 0.001 .. 0.1."""
    mixer = GatedDeltaNet(small.config(width=512, num_heads=512, key_width=1, num_layers=8), rngs=nnx.Rngs(0))
    tenths = np.linspace(0.1, 0.9, 9)
    rate = np.exp(numerics.wide(mixer.A_log[...]))
    assert 0 < rate.min() < 0.2 and 15.8 < rate.max() <= 16 + 1e-5
    numerics.assert_close(np.quantile(rate, tenths), 16 * tenths, 0.07)
    dt = oracles.softplus(numerics.wide(mixer.dt_bias[...]))
    assert dt.min() > 1e-3 - 1e-8 and dt.max() < 0.1 + 1e-6
    numerics.assert_close(np.quantile(np.log10(dt), tenths), -3 + 2 * tenths, 0.05)
    assert np.std(mixer.decay.kernel[...]) == pytest.approx((3 * 512) ** -0.5, rel=0.05)
    assert np.std(mixer.gate.kernel[...]) == pytest.approx(512**-0.5, rel=0.05)
    assert np.std(mixer.out.kernel[...]) == pytest.approx((2 / 8 / 1024) ** 0.5, rel=0.05)


def test_the_outputs_at_the_start():
    """The gate is the SiLU of standard normal numbers; its root mean square is 0.6."""
    mixer = GatedDeltaNet(small.config(width=64, num_heads=4, num_layers=8), rngs=nnx.Rngs(0))
    y, _ = numerics.jit(mixer)(jax.random.normal(jax.random.key(1), (4, 32, 64)))
    assert float(jnp.std(y)) == pytest.approx(0.6 * (2 / 8) ** 0.5, rel=0.1)
