"""The published sizes: a table of parameter counts, and some of them counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxlinear.conversion import falcon_mamba
from jaxlinear.conversion.family import Fields
from jaxlinear.errors import UserError
from jaxlinear.models import ModelConfig, presets
from jaxlinear.models.parameters import describe

# After a change of the architecture: check each number by hand, then write it here.
COUNTS = {
    "hawk_100m": 123_095_808,
    "hawk_200m": 210_023_424,
    "hawk_400m": 430_216_704,
    "hawk_1b3": 1_369_761_792,
    "hawk_3b": 3_094_760_448,
    "hawk_7b": 7_244_058_624,
    "hawk_14b": 14_807_290_880,
    "griffin_100m": 117_025_536,
    "griffin_200m": 198_165_504,
    "griffin_400m": 408_638_976,
    "griffin_1b3": 1_308_477_440,
    "griffin_3b": 2_932_952_064,
    "griffin_7b": 6_877_640_704,
    "griffin_14b": 13_814_535_168,
    "recurrentgemma_2b": 2_682_862_080,
    "recurrentgemma_9b": 8_579_977_216,
    "s5_small": 54_210_048,
    "linear_moe_a0b3_2b": 2_476_540_416,
    "linear_moe_a1b_7b": 7_336_185_856,
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1b4": 1_372_178_432,
    "mamba_2b8": 2_768_345_600,
    "falcon_mamba_7b": 7_272_665_088,
    "mamba2_130m": 128_989_632,
    "mamba2_370m": 368_346_624,
    "mamba2_780m": 780_161_280,
    "mamba2_1b3": 1_343_757_312,
    "mamba2_2b7": 2_702_599_680,
    "delta_net_340m": 374_362_112,
    "delta_net_1b3": 1_365_677_056,
    "gated_delta_net_1b3": 1_309_295_488,
    "gla_340m": 341_707_776,
    "gla_1b3": 1_365_514_240,
    "retnet_1b3": 1_351_714_816,
    "hgrn_1b3": 1_364_396_032,
    "hgrn2_1b3": 1_364_396_032,
    "transformer_340m": 373_867_520,
    "transformer_1b3": 1_364_297_728,
    "samba_421m": 421_793_280,
    "samba_1b3": 1_330_207_488,
    "gla_hybrid_340m": 341_403_648,
    "delta_net_hybrid_340m": 374_114_816,
    "delta_net_global_340m": 374_320_896,
    "based_360m": 362_620_928,
    "based_1b3": 1_349_453_056,
    "linear_llama3_1b": 1_311_312_640,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert describe(ModelConfig(**presets.find(name))).num_parameters == COUNTS[name]


@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_runs(name):
    """Shapes only: no array is made."""
    architecture = describe(ModelConfig(**presets.find(name)))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    logits, _ = jax.eval_shape(lambda values, tokens: architecture.bind(values)(tokens), architecture.shapes, tokens)
    assert logits.shape == (1, 4, architecture.config.vocab_size)


def test_gate_blocks_follow_the_heads_where_they_divide():
    blocks = {name: ModelConfig(**presets.find(name)).gate_blocks for name in ("griffin_200m", "griffin_100m")}
    assert blocks == {"griffin_200m": 8, "griffin_100m": 4}


def test_every_published_preset_is_in_the_table():
    assert {name for name in presets.PRESETS if not name.endswith(("_2m", "_3m", "_6m"))} == set(COUNTS)


def test_recurrentgemma_2b_by_hand():
    """256,000 words; 26 layers, 18 of them recurrent and 8 local; width and recurrent width 2560, 10 heads of 256."""
    vocab, width, heads, inner = 256_000, 2560, 10, 3 * 2560
    block = width // heads
    mlp = 2 * (width * inner + inner) + inner * width + width
    recurrent = 3 * (width * width + width)  # input, gate, out
    recurrent += 4 * width + width  # convolution
    recurrent += 2 * (heads * block * block + width) + width  # two gates and the decay
    local = width * width + 2 * width * 256 + width * width + width  # query, key and value, out
    norms = 2 * width
    total = vocab * width + 18 * (recurrent + mlp + norms) + 8 * (local + mlp + norms) + width
    assert total == 2_682_862_080
    assert describe(ModelConfig(**presets.find("recurrentgemma_2b"))).num_parameters == total


def test_mamba_130m_by_hand():
    """The published checkpoint has as many: 50,280 words; 24 layers of width 768, a state of 16 per channel."""
    vocab, width, inner, state, rank = 50_280, 768, 1536, 16, 48
    projections = 2 * width * inner + inner * (rank + 2 * state) + rank * inner + inner * width
    layer = projections + 4 * inner + inner + inner * state + 2 * inner + width  # convolution; A; dt and D; norm
    assert vocab * width + 24 * layer + width == COUNTS["mamba_130m"]


def test_falcon_mamba_7b_by_hand():
    """The published checkpoint has as many: 65,024 words, twice; 64 layers of width 4096, a state of 16 per channel."""
    vocab, width, inner, state, rank = 65_024, 4096, 8192, 16, 256
    projections = 2 * width * inner + inner * (rank + 2 * state) + rank * inner + inner * width
    layer = projections + 4 * inner + inner + inner * state + 2 * inner + width  # convolution; A; dt and D; norm
    assert 2 * vocab * width + 64 * layer + width == COUNTS["falcon_mamba_7b"]


def test_falcon_mamba_7b_is_the_published_one():
    """Compares the fields of its config.json that determine the arithmetic; ``expand`` does not determine the width."""
    published = {
        "conv_kernel": 4,
        "expand": 16,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "layer_norm_epsilon": 1e-05,
        "num_hidden_layers": 64,
        "state_size": 16,
        "tie_word_embeddings": False,
        "time_step_rank": 256,
        "use_bias": False,
        "use_conv_bias": True,
        "vocab_size": 65_024,
    }
    imported = falcon_mamba.FAMILY.model(Fields(published, "config.json"))
    spelt_otherwise = {
        "num_heads": 1,
        "key_width": 16,
        "norm_offset": 0.0,
    }  # heads that nothing reads; N, which 0 means
    assert ModelConfig(**imported) == ModelConfig(**presets.find("falcon_mamba_7b") | spelt_otherwise)


def test_mamba2_130m_by_hand():
    """The published checkpoint has as many: 50,288 words; 24 layers of width 768, 24 heads of 64, a state of 128."""
    vocab, width, inner, state, heads = 50_288, 768, 1536, 128, 24
    projections = width * (2 * inner + 2 * state + heads) + inner * width
    convolution = 4 * (inner + 2 * state) + inner + 2 * state
    layer = projections + convolution + 3 * heads + inner + width  # A, dt and D; the gated norm and that of the block
    assert vocab * width + 24 * layer + width == COUNTS["mamba2_130m"]


def test_delta_net_340m_by_hand():
    """32,000 words, twice; 24 layers of width 1024, 8 heads of 128. With tied embeddings it would be 341.6 M."""
    vocab, width, heads, head = 32_000, 1024, 8, 128
    mixer = 4 * width * width + heads * width + 3 * 4 * width + head  # q, k, v, out; beta; convolutions; norm
    mlp = 3 * width * 2816
    total = 2 * vocab * width + 24 * (mixer + mlp + 2 * width) + width
    assert total == COUNTS["delta_net_340m"]


def test_gated_delta_net_1b3_by_hand():
    """32,000 words; 16 layers of width 2400, 9 heads with keys of 200 and values of 400. The authors' program has 18 more
    numbers per layer: a bias of beta, and a skip that it does not use."""
    vocab, width, heads, keys, values = 32_000, 2400, 9, 1800, 3600
    mixer = width * (2 * keys + 3 * values + 2 * heads)  # q, k; v, gate, out; beta and the decay
    mixer += 4 * (2 * keys + values) + 2 * heads + 400  # convolutions; A and dt; norm
    mlp = 3 * width * 5888
    total = vocab * width + 16 * (mixer + mlp + 2 * width) + width
    assert total == COUNTS["gated_delta_net_1b3"]


@pytest.mark.parametrize(
    "name, width, inner, layers, keys, in_all, active",
    [
        ("linear_moe_a0b3_2b", 1024, 896, 12, 512, 2_165_375_488, 315_687_424),
        ("linear_moe_a1b_7b", 2048, 1024, 16, 1024, 6_713_856_000, 1_076_711_424),
    ],
)
def test_linear_moe_by_hand(name, width, inner, layers, keys, in_all, active):
    """151,936 words, twice, which the model's name does not count; a token goes to 8 of 64 experts."""
    heads = 8 if width == 1024 else 16
    mixer = width * (2 * keys + 3 * width)  # q, k; v, gate, out
    mixer += 16 * (width + keys) + keys + width // heads  # the decay's two maps; norm
    expert, router = 3 * width * inner, 64 * width
    rest = layers * (mixer + router + 2 * width) + width
    assert rest + layers * 64 * expert == in_all and rest + layers * 8 * expert == active
    assert 2 * 151_936 * width + in_all == COUNTS[name]


def test_s5_small_by_hand():
    """32,000 words; 12 layers of width 512 with 256 complex states."""
    vocab, width, states, inner = 32_000, 512, 256, 1536
    mixer = 3 * states + 2 * (2 * width * states) + width + width * width + width  # L and Delta, B and C, D, gate
    mlp = 2 * (width * inner + inner) + inner * width + width
    assert vocab * width + 12 * (mixer + mlp + 2 * width) + width == COUNTS["s5_small"]


def test_transformer_340m_by_hand():
    """32,000 words, twice; 24 layers of width 1024. With tied embeddings it would be 341.1 M."""
    layer = 4 * 1024 * 1024 + 3 * 1024 * 2816 + 2 * 1024
    assert 2 * 32_000 * 1024 + 24 * layer + 1024 == COUNTS["transformer_340m"]


def test_based_360m_by_hand():
    """50,264 words; 27 layers of width 1024: 17 convolutions of 2048 channels, 5 of linear attention with 16 heads of 16
    key channels, 5 windows."""
    width, inner = 1024, 2048
    convolution = 2 * (width * inner + inner) + 3 * inner + inner * width + width
    linear, window = 2 * width * 256 + 2 * width * width, 4 * width * width
    mlp_and_norms = 3 * width * inner + 2 * width
    total = 50_264 * width + 17 * convolution + 5 * linear + 5 * window + 27 * mlp_and_norms + width
    assert total == COUNTS["based_360m"]


def test_the_hybrids_have_their_layers_where_they_were_published():
    layers = {name: ModelConfig(**presets.find(name)).layers for name in COUNTS}
    for name in ("samba_421m", "gla_hybrid_340m", "delta_net_hybrid_340m"):
        assert set(layers[name][1::2]) == {"sliding_window"} and len(set(layers[name][0::2])) == 1, name
    of_full_attention = [i + 1 for i, mixer in enumerate(layers["delta_net_global_340m"]) if mixer == "attention"]
    assert of_full_attention == [2, 13]  # of 24: the second, and the one after the middle
    of_full_attention = [i + 1 for i, mixer in enumerate(layers["linear_llama3_1b"]) if mixer == "attention"]
    assert of_full_attention == [4, 8, 12, 16]
    for name, depth, each in (("based_360m", 27, 5), ("based_1b3", 36, 7)):
        counts = {mixer: layers[name].count(mixer) for mixer in set(layers[name])}
        assert counts == {"convolution": depth - 2 * each, "linear_attention": each, "sliding_window": each}
        assert layers[name][:8] == tuple(
            {"c": "convolution", "l": "linear_attention", "w": "sliding_window"}[letter] for letter in "clwccclw"
        )


def test_gla_340m_by_hand():
    """32,000 words; 24 layers of width 1024, 4 heads with keys of 128 and values of 256."""
    vocab, width, keys, rank, mlp = 32_000, 1024, 512, 16, 2816
    mixer = width * (2 * keys + 3 * width) + rank * (width + keys) + keys + 256  # q, k; v, gate, out; decay; norm
    total = vocab * width + 24 * (mixer + 3 * width * mlp + 2 * width) + width
    assert total == COUNTS["gla_340m"]


def test_retnet_1b3_by_hand():
    """32,000 words, twice; 24 layers of width 2048, whose mixer has 8 D^2."""
    vocab, width, mlp = 32_000, 2048, 2816
    total = 2 * vocab * width + 24 * (8 * width * width + 3 * width * mlp + 2 * width) + width
    assert total == COUNTS["retnet_1b3"]


def test_hgrn_and_hgrn2_1b3_by_hand():
    """32,000 words, twice; 24 layers of width 2048, 4 D^2 in the mixer, its norm and its lower bound. The four maps are
    input, forget, gate and out in one mixer; query, forget, value and out in the other."""
    vocab, width, mlp = 32_000, 2048, 5632
    total = 2 * vocab * width + 24 * (4 * width * width + 2 * width + 3 * width * mlp + 2 * width) + width
    assert total == COUNTS["hgrn_1b3"] == COUNTS["hgrn2_1b3"]


def test_layers_repeat_the_pattern():
    layers = ModelConfig(**presets.find("recurrentgemma_2b")).layers
    assert len(layers) == 26 and layers[:3] == ("rg_lru", "rg_lru", "sliding_window") and layers[-1] == "rg_lru"
    assert layers.count("sliding_window") == 8


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="there is no preset 'griffin_1b'; the presets are hawk_100m"):
        presets.find("griffin_1b")
