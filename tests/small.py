"""Models small enough to compile in a moment."""

import jax
import numpy as np
from flax import nnx

from jaxlinear.models import ModelConfig
from jaxlinear.models.parameters import describe
from tests import numerics

PATTERN = ("rg_lru", "rg_lru", "sliding_window")


def config(**changes):
    values = {
        "pattern": PATTERN,
        "num_layers": 5,
        "vocab_size": 31,
        "width": 16,
        "recurrent_width": 24,
        "num_heads": 2,
        "window": 4,
        "mlp_expansion": 2.0,
        "logit_soft_cap": 5.0,
        "dtype": "float32",
    }
    return ModelConfig(**(values | changes))


def parameters(architecture, seed=0, noise=0.3):
    """Float64 NumPy arrays: the initial ones, moved about so that biases and scales count."""
    random = np.random.default_rng(seed)
    initial = jax.jit(architecture.initialise)(jax.random.key(seed))
    return jax.tree.map(lambda x: np.asarray(x, np.float64) + noise * random.standard_normal(x.shape), initial)


def module(make, seed=0):
    """``(graph, float64 parameters)`` of an ``nnx`` module, the parameters moved about like those of a model."""
    random = np.random.default_rng(seed)
    graph, state = nnx.split(make(nnx.Rngs(seed)))
    pure = jax.tree.map(
        lambda x: np.asarray(x, np.float64) + 0.3 * random.standard_normal(x.shape), nnx.to_pure_dict(state)
    )
    return graph, pure


def bound(changes):
    """``(config, float64 parameters, float32 model)``."""
    small = config(**changes)
    architecture = describe(small)
    values = parameters(architecture)
    return small, values, architecture.bind(numerics.cast(values, "float32"))
