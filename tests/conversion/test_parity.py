"""Imported weights give the logits of the program they come from, to 1e-4 in float32; exported, they give the same there.

``transformers`` makes, saves and loads small random models here. The ``recurrentgemma`` package cannot be installed
alongside ours; its logits are in a file that ``recurrentgemma_golden.py`` made.
"""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; nothing here comes from a hub

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers

from jaxlinear.conversion import export_weights, import_weights
from tests import numerics
from tests.conversion import recurrentgemma_golden as golden
from tests.conversion.converted import assert_same_logits

VOCABULARY, LENGTH = 61, 21
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH))


MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 24, "state_size": 10, "num_hidden_layers": 3}
LLAMA = dict(
    **dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4),
    **dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
)
SIZES = {
    "RecurrentGemma": dict(  # a period and two more layers; the root of the width is not exact in bfloat16
        **dict(num_hidden_layers=5, vocab_size=VOCABULARY, hidden_size=24, intermediate_size=2 * 40),
        **dict(
            num_attention_heads=2, num_key_value_heads=1, lru_width=32, attention_window_size=5, logits_soft_cap=3.0
        ),
    ),
    "Mamba": MAMBA,
    "FalconMamba": MAMBA,
    "Mamba2": MAMBA | dict(num_heads=4, head_dim=12, n_groups=1, chunk_size=8),
    "Llama": LLAMA | dict(max_position_embeddings=64),
    "Mistral": LLAMA | dict(sliding_window=5, attn_implementation="eager"),
}
SCALED = dict(  # of waves of 6, 30, 140 and 660 tokens
    **dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    original_max_position_embeddings=40,
)
MODELS = {
    "recurrent_gemma": ("RecurrentGemma", {}),
    "recurrent_gemma, grouped": (
        "RecurrentGemma",
        dict(
            **dict(num_attention_heads=4, num_key_value_heads=2, block_types=["attention", "recurrent"]),
            rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0},
            **dict(rms_norm_eps=1e-2, conv1d_width=3),
        ),
    ),
    "mamba": ("Mamba", {}),
    "mamba, untied": ("Mamba", dict(tie_word_embeddings=False, conv_kernel=3, layer_norm_epsilon=1e-2, expand=3)),
    "mamba, of other widths": ("Mamba", dict(time_step_rank=5, expand=16, intermediate_size=40)),
    "falcon_mamba": ("FalconMamba", {}),
    "falcon_mamba, untied, of other widths": (  # as published: the width of the inner channels is not what expand says
        "FalconMamba",
        dict(
            **dict(tie_word_embeddings=False, time_step_rank=5, expand=16, intermediate_size=40),
            **dict(mixer_rms_eps=0.1, layer_norm_epsilon=1e-2),
        ),
    ),
    "mamba2": ("Mamba2", {}),
    "mamba2, tied": ("Mamba2", dict(tie_word_embeddings=True, conv_kernel=3, layer_norm_epsilon=1e-2)),
    "llama": ("Llama", {}),
    "llama, tied, one group": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-2)),
    "llama 3.1": ("Llama", dict(rope_parameters=SCALED)),
    "mistral": ("Mistral", {}),
    "mistral, scaled": ("Mistral", dict(rope_parameters=SCALED, tie_word_embeddings=True, sliding_window=8)),
}


def randomised(kind, changes):
    """A model whose weights are all redrawn, so that every bias and scale matters and none keeps its initial value."""
    fields = getattr(transformers, f"{kind}Config")(**(SIZES[kind] | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(fields)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS), use_cache=False).logits.numpy()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow(
    but=[
        *("recurrent_gemma, grouped", "mamba, of other widths", "falcon_mamba, untied, of other widths", "mamba2"),
        *("llama, tied, one group", "llama 3.1", "mistral, scaled"),
    ]
)
@pytest.mark.parametrize("name", MODELS)
def test_transformers(tmp_path, name):
    model = randomised(*MODELS[name])
    expected = theirs(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB" if name == "llama" else "1GB")
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (name == "llama")
    import_weights(tmp_path / "saved", tmp_path / "run")
    assert_same_logits(tmp_path / "run", TOKENS, expected)

    export_weights(tmp_path / "run", tmp_path / "exported")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(back) is type(model) and back.dtype == torch.float32
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    numerics.assert_close(theirs(back.eval()), expected, 1e-4)


def test_recurrentgemma(tmp_path):
    """As the package writes a checkpoint, without what it only holds in memory."""
    saved = np.load(golden.FILE)
    shapes = json.loads(str(saved["shapes"]))
    parameters = golden.nested(golden.parameters(shapes))
    assert "blocks.6" in parameters
    ocp.PyTreeCheckpointer().save(tmp_path / "saved", {"params": parameters})
    (tmp_path / "saved" / "config.json").write_text(json.dumps(golden.CONFIG))
    import_weights(tmp_path / "saved", tmp_path / "run")
    assert_same_logits(tmp_path / "run", golden.TOKENS, saved["logits"])
