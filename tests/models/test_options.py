"""``mixers.readers()``: which mixers read a config key, judged by the programs they compile to."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models import mixers
from jaxlinear.models.parameters import describe
from tests import small

BASE = {
    "num_heads": 2,
    "bias": True,
    "recurrent_width": 24,
    "window": 4,
    "key_value_heads": 1,
    "context": 8,
    "recurrent_heads": 2,
    "key_width": 8,
    "value_width": 4,
    "time_step_rank": 0,
    "feature_map": "elu",
    "discretization": "zero_order_hold",
    "convolution_width": 4,
    "rotary_fraction": 0.5,
    "rotary_base": 10_000.0,
    "rotary_scaling": 0.0,
    "rotary_context": 8,
    "output_norm_epsilon": 0.0,
    "selection_norm": False,
    "selection_norm_epsilon": 0.0,
    "head_norm": "group",
    "output_gate": "silu",
    "gate_bias": False,
    "negative_eigenvalues": False,
    "householders": 1,
}
OTHER = {
    "num_heads": 4,
    "bias": False,
    "recurrent_width": 48,
    "window": 5,
    "key_value_heads": 2,
    "context": 9,
    "recurrent_heads": 4,
    "key_width": 16,
    "value_width": 8,
    "time_step_rank": 5,
    "feature_map": "relu",
    "discretization": "bilinear",
    "convolution_width": 3,
    "rotary_fraction": 1.0,
    "rotary_base": 500.0,
    "rotary_scaling": 8.0,
    "rotary_context": 50,
    "output_norm_epsilon": 0.25,
    "selection_norm": True,
    "selection_norm_epsilon": 0.25,
    "head_norm": "rms",
    "output_gate": "none",
    "gate_bias": True,
    "negative_eigenvalues": True,
    "householders": 2,
}
# What else has to be set for a key to be read.
BESIDE = {
    "num_heads": {"recurrent_heads": 0},
    "rotary_context": {"rotary_scaling": 8.0},
    "selection_norm_epsilon": {"selection_norm": True},
}


@functools.cache
def program(mixer, **changes):
    """The text of a layer's program, from the random key of its parameters to its output and state: shapes, constants,
    operations."""
    config = small.config(**(BASE | changes))

    def run(key, x):
        layer = mixers.find(mixer)(config, rngs=nnx.Rngs(key))
        return layer(x, state=layer.init_state(len(x)))

    x = jax.ShapeDtypeStruct((2, 8, config.width), jnp.float32)
    return jax.jit(run).lower(jax.eval_shape(lambda: jax.random.key(0)), x).as_text()


# Mixers that normalise what they have read. So does linear attention where it is not divided by its weights; Falcon-Mamba
# normalises what it reads with.
NORMS = ("delta_net", "gated_delta_net", "gateloop", "gla", "hgrn", "hgrn2", "kda", "lightning", "mamba2", "retention")
WITH_NORMS = {"linear_attention": {"feature_map": "identity"}, "mamba": {"selection_norm": True}}


@pytest.mark.parametrize("mixer", mixers.names())
def test_norms_have_the_epsilon_of_the_config(mixer):
    """0.25 in place of 1e-6 changes the program of a mixer with a norm, and no other."""
    texts = [program(mixer, norm_epsilon=epsilon, **WITH_NORMS.get(mixer, {})) for epsilon in (1e-6, 0.25)]
    assert (texts[0] != texts[1]) == (mixer in (*NORMS, *WITH_NORMS))
    texts = [program(mixer, norm_epsilon=epsilon) for epsilon in (1e-6, 0.25)]
    assert (texts[0] != texts[1]) == (mixer in NORMS)


@pytest.mark.parametrize("mixer", (*NORMS, "linear_attention"))
def test_norms_have_the_offset_of_the_config(mixer):
    """The factor is 1 when training begins; the norms of TransNormerLLM and RetNet have no scale to offset."""
    with_norms = WITH_NORMS.get(mixer, {})
    layers = [
        mixers.find(mixer)(small.config(**(BASE | with_norms), norm_offset=offset), rngs=nnx.Rngs(0))
        for offset in (0.0, 1.0)
    ]
    if mixer in ("lightning", "retention"):
        assert not any(hasattr(layer, "norm") and hasattr(layer.norm, "scale") for layer in layers)
        return
    for layer, scale in zip(layers, (1, 0), strict=True):
        assert layer.norm.offset + scale == 1
        np.testing.assert_array_equal(layer.norm.scale[...], scale)


def test_the_norms_of_a_model_have_the_epsilon_of_the_config():
    """Those before each mixer, each MLP and the logits."""
    architecture = describe(small.config(pattern=("rg_lru",), num_layers=1, norm_epsilon=0.25))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    text = jax.jit(lambda p, tokens: architecture.bind(p)(tokens)[0]).lower(architecture.shapes, tokens).as_text()
    assert "dense<2.500000e-01>" in text and "9.99999997E-7" not in text


@pytest.mark.parametrize("mixer", mixers.names())
def test_a_mixer_reads_what_the_table_says(mixer):
    """Each key that it reads changes its program; the others, all at once, change nothing at all."""
    reads = {name for name, readers in mixers.readers().items() if mixer in readers}
    for name in reads:
        beside = BESIDE.get(name, {})
        assert program(mixer, **beside, **{name: OTHER[name]}) != program(mixer, **beside), name
    others = {name: value for name, value in OTHER.items() if name not in reads}
    beside = dict(itertools.chain.from_iterable(BESIDE.get(name, {}).items() for name in others))
    assert program(mixer, **(beside | others)) == program(mixer, **beside)


def test_the_table_names_keys_and_mixers_that_there_are():
    assert set(mixers.readers()) == set(BASE) == set(OTHER)
    assert {mixer for readers in mixers.readers().values() for mixer in readers} <= set(mixers.names())
