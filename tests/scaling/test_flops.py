"""FLOPs by hand, by brute force, and against what XLA counts in the compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxlinear.models import ModelConfig, mixers
from jaxlinear.models.parameters import describe
from jaxlinear.scaling import flops

CONFIG = ModelConfig(
    pattern=("rg_lru", "rg_lru", "sliding_window"),
    num_layers=5,
    vocab_size=96,
    width=32,
    recurrent_width=48,
    num_heads=4,
    window=8,
    mlp_expansion=2.0,
)
LENGTH = 32


def test_rg_lru_by_hand():
    projections = 3 * 2 * 32 * 48  # input, gate, out
    gates = 2 * 2 * 4 * 12 * 12  # two, of four blocks
    convolution, recurrence = 2 * 4 * 48, 5 * 48
    assert flops.rg_lru(CONFIG, LENGTH) == projections + gates + convolution + recurrence == 12_144


def test_sliding_window_by_hand():
    seen = (sum(range(1, 9)) + 24 * 8) / 32
    projections = 2 * 2 * 32 * 32 + 2 * 2 * 32 * 8  # query and out; one key and value head of 8
    products = 2 * 2 * 32 * seen
    assert flops.sliding_window(CONFIG, LENGTH) == projections + products == 6_032


def test_a_model_by_hand():
    mlp = 3 * 2 * 32 * 64
    assert flops.gated_mlp(CONFIG) == mlp == 12_288
    forward = 4 * 12_144 + 6_032 + 5 * 12_288 + 2 * 32 * 96
    assert flops.forward_flops_per_token(CONFIG, LENGTH) == forward
    assert flops.training_flops_per_token(CONFIG, LENGTH) == 3 * forward


@pytest.mark.parametrize("length, window", [(1, 1), (1, 5), (7, 1), (7, 3), (7, 7), (7, 100), (64, 16)])
def test_mean_context_by_brute_force(length, window):
    seen = [sum(0 <= query - key < window for key in range(length)) for query in range(length)]
    assert flops.mean_context(length, window) == pytest.approx(sum(seen) / length, rel=1e-12)


def test_every_mixer_has_its_formula():
    assert set(flops.MIXERS) == set(mixers.MIXERS)


@pytest.mark.parametrize("pattern", ["rg_lru", "sliding_window"])
def test_xla_counts_as_many(pattern):
    """One layer, so that the scan's body, which XLA counts once, is the whole of it."""
    config = dataclasses.replace(
        CONFIG,
        pattern=(pattern,),
        num_layers=1,
        width=128,
        recurrent_width=128,
        vocab_size=512,
        dtype="float32",
        remat="none",
        logit_soft_cap=0.0,
    )
    architecture, batch = describe(config), 2
    tokens = jax.ShapeDtypeStruct((batch, LENGTH), jnp.int32)

    def forward(parameters, tokens):
        return architecture.bind(parameters)(tokens)[0]

    lowered = jax.jit(forward).lower(architecture.shapes, tokens)
    counted = lowered.cost_analysis()["flops"] / (batch * LENGTH)
    assert counted == pytest.approx(flops.forward_flops_per_token(config, LENGTH), rel=0.1)
