"""Mamba and Longhorn: their parameters, their initial values, and their limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.longhorn import Longhorn
from jaxlinear.models.mixers.mamba import Mamba
from jaxlinear.models.parameters import describe
from jaxlinear.training.optimizer import decay_mask
from tests import numerics, oracles, small

CONFIG = small.config(key_width=5, width=40)


def test_the_parameters():
    """24 channels with a state of 5 each; the time step has rank 40 / 16, rounded up."""
    expected = {
        **{name: {"kernel": shape} for name, shape in {"value": (40, 24), "gate": (40, 24), "out": (24, 40)}.items()},
        "selection": {"kernel": (24, 3 + 2 * 5)},
        "time_step": {"kernel": (3, 24)},
        "value_convolution": {"convolution_kernel": (4, 24), "convolution_bias": (24,)},
        "dt_bias": (24,),
        "D": (24,),
    }
    for mixer, own in ((Mamba, {"A_log": (24, 5)}), (Longhorn, {})):
        _, parameters = small.module(lambda rngs, mixer=mixer: mixer(CONFIG, rngs=rngs))
        assert jax.tree.map(np.shape, parameters) == expected | own


@pytest.mark.parametrize("mixer", ["mamba", "longhorn"])
def test_rates_and_vectors_are_not_decayed(mixer):
    mask = decay_mask(describe(small.config(pattern=(mixer,), num_layers=2)))["stacks"][0]["blocks"][0]["mixer"]
    names = {path[-1].key for path, decayed in jax.tree.leaves_with_path(mask) if decayed}
    assert names == {"kernel", "convolution_kernel"}


def test_another_rank():
    """The rank is the fan-in for the initial values of the time step's kernel."""
    config = dataclasses.replace(CONFIG, time_step_rank=200, recurrent_width=400)
    for made in (Mamba, Longhorn):
        mixer = made(config, rngs=nnx.Rngs(0))
        assert mixer.selection.kernel.shape == (400, 200 + 2 * 5) and mixer.time_step.kernel.shape == (200, 400)
        assert np.std(mixer.time_step.kernel[...]) == pytest.approx((3 * 200) ** -0.5, rel=0.05)


def test_the_widths_of_the_paper():
    mixer = nnx.eval_shape(lambda: Mamba(small.config(width=64, recurrent_width=128), rngs=nnx.Rngs(0)))
    assert mixer.rank == 4
    assert jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: mixer.init_state(5))) == {
        "memory": (5, 128, 16),
        "value": (5, 3, 128),
    }


def test_the_parameters_at_the_start():
    """A is -1 .. -N in every channel, the time step log-uniform in 0.001 .. 0.1."""
    config = small.config(width=256, recurrent_width=2048, num_layers=8)
    mixer = Mamba(config, rngs=nnx.Rngs(0))
    numerics.assert_close(np.exp(mixer.A_log[...]), np.broadcast_to(np.arange(1.0, 17), (2048, 16)), 1e-6)
    dt = oracles.softplus(numerics.wide(mixer.dt_bias[...]))
    tenths = np.linspace(0.1, 0.9, 9)
    numerics.assert_close(np.quantile(np.log10(dt), tenths), -3 + 2 * tenths, 0.03)
    assert (mixer.D[...] == 1).all()
    for name, inputs in {"value": 256, "gate": 256, "selection": 2048, "time_step": 16, "out": 8 * 2048}.items():
        assert np.std(getattr(mixer, name).kernel[...]) == pytest.approx((3 * inputs) ** -0.5, rel=0.05), name
    longhorn = Longhorn(config, rngs=nnx.Rngs(0))
    assert not longhorn.dt_bias[...].any() and not hasattr(longhorn, "A_log")


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
