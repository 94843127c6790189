"""Mamba and Longhorn: their limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.longhorn import Longhorn
from jaxlinear.models.mixers.mamba import Mamba
from tests import numerics, small

CONFIG = small.config(key_width=5, width=40)


@pytest.mark.parametrize("limit", ["no steps", "fast decay"])
def test_what_is_seen_of_the_past(limit):
    """With time steps of 0 nothing is stored, and what is read is D x; with a fast decay only the present is left."""
    config = dataclasses.replace(CONFIG, convolution_width=1)
    graph, parameters = small.module(lambda rngs: Mamba(config, rngs=rngs))
    parameters = numerics.cast(parameters, "float32")
    if limit == "no steps":
        parameters["dt_bias"] = jnp.full((24,), -1e4)
    else:
        parameters["A_log"] = jnp.full((24, 5), 20.0)
    x = jax.random.normal(jax.random.key(0), (2, 5, 40))
    run = numerics.jit(lambda x: nnx.merge(graph, parameters)(x))
    y, state = run(x)
    assert y.std() > 0.01 and bool(state["memory"].any()) == (limit == "fast decay")
    alone, _ = run(x.reshape(10, 1, 40))
    numerics.assert_close(y, alone.reshape(2, 5, 40), 1e-6)


@pytest.mark.parametrize("selection_norm", [False, True])
def test_the_size_of_what_is_selected(selection_norm):
    """It does not matter to Falcon-Mamba, which normalises what is selected, with norms that have no parameters."""
    config = dataclasses.replace(CONFIG, selection_norm=selection_norm, selection_norm_epsilon=1e-20)
    graph, parameters = small.module(lambda rngs: Mamba(config, rngs=rngs))
    assert jax.tree.structure(parameters) == jax.tree.structure(small.module(lambda rngs: Mamba(CONFIG, rngs=rngs))[1])
    parameters = numerics.cast(parameters, "float32")
    run = numerics.jit(lambda parameters, x: nnx.merge(graph, parameters)(x)[0])
    x = jax.random.normal(jax.random.key(0), (2, 5, 40))
    y = run(parameters, x)
    parameters["selection"]["kernel"] *= 64
    difference = np.abs(run(parameters, x) - y).max() / np.abs(y).max()
    assert difference < 1e-5 if selection_norm else difference > 0.1


def test_longhorn_remembers_what_it_is_sure_of():
    """With beta near infinity dt would be 1 / |k|^2; at most it is 1 / (1 + |k|^2), so that the share forgotten of each
    number of the state, dt k_n^2, and the sum of these shares are below 1."""
    graph, parameters = small.module(lambda rngs: Longhorn(CONFIG, rngs=rngs))
    mixer = nnx.merge(graph, numerics.cast(parameters, "float32"))
    k = 30 * jax.random.normal(jax.random.key(0), (2, 5, 5))
    dt, A = mixer.transition(jnp.full((2, 5, 24), 1e4), k)
    assert A is None
    forgotten = np.asarray(dt)[..., None] * np.asarray(k)[:, :, None] ** 2
    assert (forgotten.sum(-1) < 1).all() and forgotten.sum(-1).min() > 0.99
    dt, _ = mixer.transition(jnp.full((2, 5, 24), -1e4), k)
    assert not dt.any()
