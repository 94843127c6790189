"""Models small enough to compile in a moment."""

import jax
import numpy as np
from flax import nnx

from jaxlinear.models import ModelConfig
from jaxlinear.models.parameters import describe
from tests import numerics

PATTERN = ("rg_lru", "rg_lru", "sliding_window")

# At least one of each operation: the mixers with which ``make test`` runs what every mixer must pass.
SOME_MIXERS = ("attention", "convolution", "gla", "kda", "mamba", "mamba2", "rg_lru", "s5", "sliding_window")


def config(**changes):
    values = {
        "pattern": PATTERN,
        "num_layers": 8,  # two periods, scanned, and two more layers
        "vocab_size": 31,
        "width": 16,
        "recurrent_width": 24,
        "num_heads": 2,
        "window": 4,
        "mlp_expansion": 2.0,
        "embedding_scale": True,
        "logit_soft_cap": 5.0,
        "dtype": "float32",
    }
    return ModelConfig(**(values | changes))


def parameters(shapes, seed=0):
    """Float64 NumPy arrays of these shapes, drawn so that every gate, bias and scale matters."""
    random = np.random.default_rng(seed)

    def draw(path, shape):
        name = path[-1].key
        size = {"embedding": shape.shape[-1] ** -0.5}.get(name, 0.3)
        if name.endswith("kernel"):
            size = shape.shape[-2] ** -0.5
        values = size * random.standard_normal(shape.shape)
        if name == "log_decay":
            return -abs(values)
        if name == "lower_bound":
            return abs(values) % 1
        return values - 3 if name == "decay" else values

    return jax.tree.map_with_path(draw, shapes)


def module(make):
    """``(graph, float64 parameters)`` of the ``nnx`` module that ``make(Rngs)`` returns."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return graph, parameters(nnx.to_pure_dict(state))


def bound(changes):
    """``(config, float64 parameters, float32 model)``."""
    small = config(**changes)
    architecture = describe(small)
    values = parameters(architecture.shapes)
    return small, values, architecture.bind(numerics.cast(values, "float32"))
