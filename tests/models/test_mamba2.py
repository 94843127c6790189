"""Mamba-2: its its limits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.models.mixers.mamba2 import Mamba2
from jaxlinear.ops import backends
from tests import numerics, small

CONFIG = small.config(key_width=6, value_width=8)


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
