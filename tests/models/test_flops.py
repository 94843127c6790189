"""FLOPs by hand, by brute force, and against XLA's count for the compiled program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jaxlinear.models import ModelConfig, flops, mixers
from jaxlinear.models.cached_attention import mean_context
from jaxlinear.models.parameters import describe

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


def of_mixer(name, config, length):
    return mixers.find(name).flops(config, length)


def test_rg_lru_by_hand():
    projections = 3 * 2 * 32 * 48  # input, gate, out
    gates = 2 * 2 * 4 * 12 * 12  # two, of four blocks
    convolution, recurrence = 2 * 4 * 48, 5 * 48
    assert of_mixer("rg_lru", CONFIG, LENGTH) == projections + gates + convolution + recurrence == 12_144


def test_sliding_window_by_hand():
    seen = (sum(range(1, 9)) + 24 * 8) / 32
    projections = 2 * 2 * 32 * 32 + 2 * 2 * 32 * 8  # query and out; one key and value head of 8
    products = 2 * 2 * 32 * seen
    assert of_mixer("sliding_window", CONFIG, LENGTH) == projections + products == 6_032


def test_attention_by_hand():
    """4 query heads of 8, and two heads of keys and values."""
    config = dataclasses.replace(CONFIG, key_value_heads=2)
    seen = sum(range(1, 33)) / 32
    projections = 2 * 2 * 32 * 32 + 2 * 2 * 32 * 16  # query and out; key and value
    products = 2 * 2 * 32 * seen
    assert of_mixer("attention", config, LENGTH) == projections + products == 8_256
    assert of_mixer("sliding_window", config, LENGTH) == of_mixer("sliding_window", CONFIG, LENGTH) + 2 * 2 * 32 * 8


def test_convolution_by_hand():
    assert of_mixer("convolution", CONFIG, LENGTH) == 3 * 2 * 32 * 48 + 2 * 4 * 48 == 9_600


def test_mamba_by_hand():
    """48 channels with a state of 8; the time step has rank 2."""
    projections = 2 * 32 * 48 * 3 + 2 * 48 * (2 + 8 + 8) + 2 * 2 * 48  # x, z, out; the selection; dt
    convolution, skip = 2 * 4 * 48, 2 * 48
    recurrence = 48 + 48 * 8 * (1 + 1 + 2 + 2)  # dt x; dt A, the product with B, a multiply-add, and another to read
    config = dataclasses.replace(CONFIG, key_width=8)
    assert of_mixer("mamba", config, LENGTH) == projections + convolution + skip + recurrence == 13_968
    of_keys = 48 * 8 + 2 * 8 + 3 * 48  # 1 - dt k^2 instead of dt A; |k|^2; dt from beta and it
    assert of_mixer("longhorn", config, LENGTH) == of_mixer("mamba", config, LENGTH) + of_keys == 14_512
    of_rank = 2 * 2 * 48 * 3  # to the low rank and back
    for count in (functools.partial(of_mixer, "mamba"), functools.partial(of_mixer, "longhorn")):
        assert count(dataclasses.replace(config, time_step_rank=5), LENGTH) == count(config, LENGTH) + of_rank


def test_mamba2_by_hand():
    """3 heads with a state of 8 x 16."""
    projections = 2 * 32 * (48 + 48 + 8 + 8 + 3) + 2 * 48 * 32  # z, x, B, C, dt; out
    convolution, skip = 2 * 4 * (48 + 8 + 8), 2 * 48
    recurrence = 3 * 2 * (2 * 8 * 16)
    config = dataclasses.replace(CONFIG, key_width=8, value_width=16)
    assert of_mixer("mamba2", config, LENGTH) == projections + convolution + skip + recurrence == 12_576


def test_delta_net_by_hand():
    """4 heads of 8."""
    projections = 2 * 32 * 32 * 4 + 2 * 32 * 4  # q, k, v, out; beta
    convolution = 2 * 4 * 32 * 3
    recurrence = 4 * (3 * 2 * 8 * 8 + 2 * 8)
    assert of_mixer("delta_net", CONFIG, LENGTH) == projections + convolution + recurrence == 10_816


def test_gated_delta_net_by_hand():
    """4 heads with keys of 6 and values of 12."""
    projections = 2 * 32 * 24 * 2 + 2 * 32 * 48 * 3 + 2 * 32 * 4 * 2  # q, k; v, gate, out; beta, decay
    convolution = 2 * 4 * (24 + 24 + 48)
    recurrence = 4 * (3 * 2 * 6 * 12 + 2 * 12)
    assert of_mixer("gated_delta_net", CONFIG, LENGTH) == projections + convolution + recurrence == 15_392


@pytest.mark.parametrize(
    "gate, plain, gated", [("auto", 10_816, 15_392), ("none", 10_816, 12_320), ("silu", 12_864, 15_392)]
)
def test_output_gates_by_hand(gate, plain, gated):
    """2 x 32 x 32 where values add up to D, 2 x 32 x 48 where they add up to 3/2 D."""
    config = dataclasses.replace(CONFIG, output_gate=gate)
    assert of_mixer("delta_net", config, LENGTH) == plain
    assert of_mixer("gated_delta_net", config, LENGTH) == gated


def test_kda_by_hand():
    """4 heads of 8."""
    low_rank = 2 * (2 * 32 * 8 + 2 * 8 * 32)
    assert of_mixer("kda", CONFIG, LENGTH) == of_mixer("delta_net", CONFIG, LENGTH) + low_rank == 12_864


def test_householders_by_hand():
    """Three for each of 4 heads of 8, with one query and one output."""
    projections = 2 * 32 * 32 * (2 + 2 * 3) + 2 * 32 * 4 * 3  # q, out, each k and v; each beta
    convolution = 2 * 4 * 32 * (1 + 2 * 3)
    recurrence = 4 * (2 * 8 * 8 + 3 * (2 * 2 * 8 * 8 + 2 * 8))
    config = dataclasses.replace(CONFIG, householders=3)
    assert of_mixer("delta_net", config, LENGTH) == projections + convolution + recurrence == 22_720


def test_lru_by_hand():
    """48 complex states."""
    projections, unit = 2 * 2 * 32 * 48 + 2 * 2 * 48 * 32, 2 * 32 * 64  # into and out of two parts; value and gate
    recurrence, skip = 48 * (6 + 2), 2 * 32
    assert of_mixer("lru", CONFIG, LENGTH) == projections + unit + recurrence + skip == 16_832


def test_s5_by_hand():
    """24 complex states."""
    projections, gate = 2 * 2 * 32 * 24 + 2 * 2 * 24 * 32, 2 * 32 * 32
    recurrence, skip = 24 * (6 + 2), 2 * 32
    assert of_mixer("s5", CONFIG, LENGTH) == projections + gate + recurrence + skip == 8_448


def test_gateloop_by_hand():
    """48 channels."""
    projections = 2 * 32 * 48 * 7  # q, k, v, magnitude, phase, gate, out
    recurrence = 48 * (2 + 1 + 6 + 1 + 1)
    assert of_mixer("gateloop", CONFIG, LENGTH) == projections + recurrence == 22_032


def test_gla_by_hand():
    """4 heads with keys of 4 and values of 8."""
    projections = 2 * 32 * 16 * 2 + 2 * 32 * 32 * 3  # q, k; v, gate, out
    decay = 2 * 32 * 16 + 2 * 16 * 16
    recurrence = 4 * (2 * 2 + 1) * 4 * 8
    assert of_mixer("gla", CONFIG, LENGTH) == projections + decay + recurrence == 10_368


def test_hgrn_by_hand():
    """48 channels."""
    projections = 4 * 2 * 32 * 48  # input, forget, gate, out
    recurrence = 48 * (1 + 1 + 1 + 2)  # (1 - b) sigmoid, 1 less that, the input by it, a multiply-add
    assert of_mixer("hgrn", CONFIG, LENGTH) == projections + recurrence == 12_528


def test_hgrn2_by_hand():
    """4 heads of 8."""
    config = dataclasses.replace(CONFIG, key_width=8)
    assert of_mixer("hgrn2", config, LENGTH) == 4 * 2 * 32 * 32 + 4 * (2 * 2 + 1) * 8 * 8 == 9_472


def test_lightning_by_hand():
    """4 heads of 8."""
    assert of_mixer("lightning", CONFIG, LENGTH) == 5 * 2 * 32 * 32 + 4 * (2 * 2 + 1) * 8 * 8 == 11_520


def test_retention_by_hand():
    """4 heads with keys of 8 and values of 16."""
    projections = 2 * 2 * 32 * 32 + 3 * 2 * 32 * 64
    assert of_mixer("retention", CONFIG, LENGTH) == projections + 4 * (2 * 2 + 1) * 8 * 16 == 18_944


@pytest.mark.parametrize(
    "feature_map, key_width, features, values, maps, total",
    [
        ("identity", 8, 8, 8, 0, 9_216),
        ("elu", 8, 8, 9, 0, 9_344),
        ("relu", 8, 8, 9, 0, 9_344),
        ("taylor", 16, 1 + 16 + 136, 9, 0, 34_320),
        ("rebased", 16, 136, 9, 0, 31_872),
        ("hedgehog", 8, 16, 9, 2 * 4 * 2 * 8 * 8, 11_520),
    ],
)
def test_linear_attention_by_hand(feature_map, key_width, features, values, maps, total):
    """4 heads with values of 8, and the denominator."""
    projections = 2 * 2 * 32 * 4 * key_width + 2 * 2 * 32 * 32
    recurrence = 4 * 2 * 2 * features * values
    config = dataclasses.replace(CONFIG, feature_map=feature_map)
    assert of_mixer("linear_attention", config, LENGTH) == projections + maps + recurrence == total


# Beside the products with kernels, by hand: 4 heads (6 of Mamba-2) with keys of 5 and values of 12, or 72 channels;
# 10 heads of attention.
OF_STATES = {
    "attention": 10 * 2 * 2 * 4 * sum(range(1, 33)) / 32,
    "convolution": 0,
    "delta_net": 4 * (3 * 2 * 5 * 12 + 2 * 12),
    "gated_delta_net": 4 * (3 * 2 * 5 * 12 + 2 * 12),
    "gateloop": 72 * 11,
    "gla": 4 * 5 * 5 * 12,
    "hgrn": 72 * 5,
    "hgrn2": 4 * 5 * 5 * 12,
    "kda": 4 * (3 * 2 * 5 * 12 + 2 * 12),
    "lightning": 4 * 5 * 5 * 12,
    "linear_attention": 4 * 4 * 2 * 5 * 13,
    "longhorn": 72 * (3 + 6 * 5) + 72 * 5 + 2 * 5 + 3 * 72,
    "lru": 72 * 8 + 2 * 40,
    "mamba": 72 * (3 + 6 * 5),
    "mamba2": 6 * 4 * 5 * 12 + 2 * 72,
    "retention": 4 * 5 * 5 * 12,
    "rg_lru": 72 * 5,
    "s5": 36 * 8 + 2 * 40,
    "sliding_window": 10 * 2 * 2 * 4 * (sum(range(1, 9)) + 24 * 8) / 32,
}


@pytest.mark.parametrize("mixer", mixers.names())
def test_every_number_in_a_kernel_is_multiplied_once_a_token(mixer):
    """No two widths are equal, so that none can stand for another."""
    sizes = {"width": 40, "recurrent_width": 72, "key_width": 5, "value_width": 12, "convolution_width": 3}
    sizes |= {
        "num_heads": 10,
        "recurrent_heads": 4,
        "time_step_rank": 7,
        "key_value_heads": 2,
        "feature_map": "hedgehog",
    }
    config = dataclasses.replace(CONFIG, pattern=(mixer,), num_layers=1, channel_mixer="none", **sizes)
    block = describe(config).shapes["stacks"][0]["blocks"][0]["mixer"]
    kernels = [x.size for path, x in jax.tree_util.tree_leaves_with_path(block) if path[-1].key.endswith("kernel")]
    assert of_mixer(mixer, config, LENGTH) == 2 * sum(kernels) + OF_STATES[mixer]


def test_channel_mixers_by_hand():
    """Two of six experts of width 10."""
    experts = {"experts": 6, "experts_per_token": 2, "expert_width": 10}
    config = dataclasses.replace(CONFIG, channel_mixer="mixture_of_experts", **experts)
    mixture = 2 * 32 * 6 + 2 * (3 * 2 * 32 * 10 + 2 * 32)  # router; for each expert, three projections and its weight
    assert flops.mixture_of_experts(config) == mixture == 4_352
    none = flops.forward_flops_per_token(dataclasses.replace(CONFIG, channel_mixer="none"), LENGTH)
    assert flops.forward_flops_per_token(config, LENGTH) == none + 5 * 4_352
    assert flops.forward_flops_per_token(CONFIG, LENGTH) == none + 5 * 12_288


def test_a_model_by_hand():
    mlp = 3 * 2 * 32 * 64
    assert flops.gated_mlp(CONFIG) == mlp == 12_288
    forward = 4 * 12_144 + 6_032 + 5 * 12_288 + 2 * 32 * 96
    assert flops.forward_flops_per_token(CONFIG, LENGTH) == forward
    assert flops.training_flops_per_token(CONFIG, LENGTH) == 3 * forward


@pytest.mark.parametrize("length, window", [(1, 1), (1, 5), (7, 1), (7, 3), (7, 7), (7, 100), (64, 16)])
def test_mean_context_by_brute_force(length, window):
    seen = [sum(0 <= query - key < window for key in range(length)) for query in range(length)]
    assert mean_context(length, window) == pytest.approx(sum(seen) / length, rel=1e-12)


IN_TIME = ["rg_lru", "sliding_window", "attention", "convolution", "lru", "s5", "gateloop", "hgrn"]


def one_layer(pattern, **changes):
    """With one layer, the scan's body, which XLA counts once, is the whole scan."""
    small = {"width": 128, "recurrent_width": 128, "vocab_size": 512, "dtype": "float32", "logit_soft_cap": 0.0}
    return dataclasses.replace(CONFIG, pattern=(pattern,), num_layers=1, **small, **changes)


@pytest.mark.parametrize("pattern", IN_TIME)
def test_xla_counts_as_many(pattern):
    config = one_layer(pattern, remat="none")
    architecture, batch = describe(config), 2
    tokens = jax.ShapeDtypeStruct((batch, LENGTH), jnp.int32)

    def forward(parameters, tokens):
        return architecture.bind(parameters)(tokens)[0]

    lowered = jax.jit(forward).lower(architecture.shapes, tokens)
    counted = lowered.cost_analysis()["flops"] / (batch * LENGTH)
    assert counted == pytest.approx(flops.forward_flops_per_token(config, LENGTH), rel=0.1)


ONE_TOKEN = [
    *((name, {}) for name in sorted(set(mixers.names()) - set(IN_TIME))),
    ("gated_delta_net", {"householders": 3}),
    ("delta_net", {"output_gate": "silu"}),
    ("gated_delta_net", {"output_gate": "none"}),
]


@pytest.mark.parametrize("pattern, changes", ONE_TOKEN, ids=str)
def test_xla_counts_as_many_for_one_token(pattern, changes):
    """For mixers whose chunked form does more than their formula counts: a decoding step, which is the recurrence."""
    config = one_layer(pattern, key_width=16, value_width=32, **changes)
    architecture, batch = describe(config), 2

    def step(parameters, tokens, state):
        return architecture.bind(parameters)(tokens, state=state)

    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    state = jax.eval_shape(lambda parameters: architecture.bind(parameters).init_state(batch), architecture.shapes)
    counted = jax.jit(step).lower(architecture.shapes, tokens, state).cost_analysis()["flops"] / batch
    mixer = of_mixer(pattern, config, 1)
    others = flops.forward_flops_per_token(config, 1) - mixer
    # The count includes norms and activations, those of the MLP too.
    assert 1 < (counted - others) / mixer < 1.1


def test_without_the_logits():
    logits = 2 * CONFIG.width * CONFIG.vocab_size
    assert flops.forward_flops_per_token(CONFIG, LENGTH, logits=False) == (
        flops.forward_flops_per_token(CONFIG, LENGTH) - logits
    )
    assert flops.training_flops_per_token(CONFIG, LENGTH, logits=False) == (
        flops.training_flops_per_token(CONFIG, LENGTH) - 3 * logits
    )


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_the_embeddings(tied):
    one = CONFIG.vocab_size * CONFIG.width
    architecture = describe(dataclasses.replace(CONFIG, tied_embeddings=tied))
    assert architecture.num_embedding_parameters == (one if tied else 2 * one)
    other = describe(dataclasses.replace(CONFIG, tied_embeddings=tied, vocab_size=2 * CONFIG.vocab_size))
    assert other.num_parameters - architecture.num_parameters == architecture.num_embedding_parameters
