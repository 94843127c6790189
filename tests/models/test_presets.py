"""The published sizes: a table of parameter counts, and one of them counted by hand."""

import jax
import jax.numpy as jnp
import pytest

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
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert describe(ModelConfig(**presets.find(name))).num_parameters == COUNTS[name]


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


def test_layers_repeat_the_pattern():
    layers = ModelConfig(**presets.find("recurrentgemma_2b")).layers
    assert len(layers) == 26 and layers[:3] == ("rg_lru", "rg_lru", "sliding_window") and layers[-1] == "rg_lru"
    assert layers.count("sliding_window") == 8


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="there is no preset 'griffin_1b'; there are hawk_100m"):
        presets.find("griffin_1b")
