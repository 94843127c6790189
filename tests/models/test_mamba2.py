"""Mamba-2: its parameters, their initial values, and its limits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.errors import UserError
from jaxlinear.models.mixers.mamba2 import Mamba2
from jaxlinear.ops import backends
from tests import numerics, oracles, small

CONFIG = small.config(key_width=6, value_width=8)


def test_the_parameters():
    """3 heads of 8, which share one key and one query of 6."""
    _, parameters = small.module(lambda rngs: Mamba2(CONFIG, rngs=rngs))
    kernels = {
        "gate": (16, 24),
        "value": (16, 24),
        "key": (16, 6),
        "query": (16, 6),
        "time_step": (16, 3),
        "out": (24, 16),
    }
    filters = {f"{name}_convolution": kernels[name][1] for name in ("value", "key", "query")}
    assert jax.tree.map(np.shape, parameters) == {
        **{name: {"kernel": shape} for name, shape in kernels.items()},
        **{name: {"convolution_kernel": (4, n), "convolution_bias": (n,)} for name, n in filters.items()},
        **{name: (3,) for name in ("A_log", "dt_bias", "D")},
        "norm": {"scale": (24,)},
    }


def test_the_widths_of_the_paper():
    mixer = nnx.eval_shape(lambda: Mamba2(small.config(width=64, recurrent_width=128), rngs=nnx.Rngs(0)))
    assert jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: mixer.init_state(5))) == {
        "memory": (5, 2, 128, 64),
        "query": (5, 3, 128),
        "key": (5, 3, 128),
        "value": (5, 3, 128),
    }


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"^mamba2: the heads' width 64 does not divide model.recurrent_width=24; set"):
        Mamba2(small.config(), rngs=nnx.Rngs(0))


def test_the_parameters_at_the_start():
    """1,024 heads: A uniform in 1 .. 16, the time step log-uniform in 0.001 .. 0.1."""
    config = small.config(width=256, recurrent_width=2048, value_width=2, key_width=128, num_layers=8)
    mixer = Mamba2(config, rngs=nnx.Rngs(0))
    tenths = np.linspace(0.1, 0.9, 9)
    rate = np.exp(numerics.wide(mixer.A_log[...]))
    assert 1 < rate.min() < 1.1 and 15.9 < rate.max() <= 16 + 1e-5
    numerics.assert_close(np.quantile(rate, tenths), 1 + 15 * tenths, 0.05)
    dt = oracles.softplus(numerics.wide(mixer.dt_bias[...]))
    assert 1e-3 - 1e-8 < dt.min() < 1.02e-3 and 0.098 < dt.max() < 0.1 + 1e-6
    numerics.assert_close(np.quantile(np.log10(dt), tenths), -3 + 2 * tenths, 0.03)
    assert (mixer.D[...] == 1).all() and not mixer.norm.scale[...].any()
    for name in ("gate", "value", "key", "query", "time_step"):
        assert np.std(getattr(mixer, name).kernel[...]) == pytest.approx((3 * 256) ** -0.5, rel=0.05), name
    assert np.std(mixer.out.kernel[...]) == pytest.approx((3 * 8 * 2048) ** -0.5, rel=0.05)


def test_the_outputs_at_the_start():
    config = small.config(width=64, recurrent_width=128, value_width=16, key_width=16, num_layers=8)
    y, _ = numerics.jit(Mamba2(config, rngs=nnx.Rngs(0)))(jax.random.normal(jax.random.key(1), (4, 32, 64)))
    assert float(jnp.std(y)) == pytest.approx((3 * 8) ** -0.5, rel=0.1)


@pytest.mark.parametrize("limit", ["no steps", "fast decay"])
def test_what_is_seen_of_the_past(limit):
    """With time steps of 0 nothing is stored, and y is D x; with a fast decay only the present is left in memory."""
    config = dataclasses.replace(CONFIG, convolution_width=1)
    graph, parameters = small.module(lambda rngs: Mamba2(config, rngs=rngs))
    parameters = numerics.cast(parameters, "float32")
    if limit == "no steps":
        parameters["dt_bias"] = jnp.full((3,), -1e4)
    else:
        parameters["A_log"] = jnp.full((3,), 20.0)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    run = numerics.jit(lambda x: nnx.merge(graph, parameters)(x))
    y, state = run(x)
    assert y.std() > 0.01 and bool(state["memory"].any()) == (limit == "fast decay")
    alone, _ = run(x.reshape(10, 1, 16))
    numerics.assert_close(y, alone.reshape(2, 5, 16), 1e-6)


@pytest.mark.usefixtures("optimised")
def test_on_tpu_the_channels_are_turned_round_for_the_time_step_alone():
    """Forward: heads of 64 channels are transposed to put time last, and back, only for the product with the time step."""
    config = small.config(width=256, recurrent_width=512, dtype="bfloat16")
    device = targets.find("v5e:1x1").devices[0]
    graph, parameters = nnx.split(nnx.eval_shape(lambda: Mamba2(config, rngs=nnx.Rngs(0))))

    def forward(parameters, x):
        with backends.use_device(device):
            return nnx.merge(graph, parameters)(x)[0]

    placed = SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2, 1024, 256), jnp.bfloat16)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), (parameters, x))
    text = jax.jit(forward).lower(*given).compile().as_text()
    turned = re.findall(r"= f32\[2,1024,512\]\{[\d,]+\S* copy\(", text)
    assert len(turned) <= 1, turned
