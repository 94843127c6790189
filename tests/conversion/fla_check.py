"""Compares ``fla_reference.py`` with flash-linear-attention itself: run by hand, since the package needs Triton.

    python3.11 -m venv FLA
    FLA/bin/pip install torch transformers einops triton
    FLA/bin/pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0
    FLA/bin/python tests/conversion/fla_check.py [DIRECTORY ...]

The package's own modules and kernels run on the CPU, in Triton's interpreter. For each model in ``MODELS`` the script
compares the names and shapes of its tensors, and its logits for rows short enough for the recurrent kernels and long enough
for the chunked ones (delta_net and gated_deltaproduct have none for float32; hgrn's chunks are of 128 tokens).
The package's mamba and mamba2, whose tensors have transformers' names, are compared with the models of transformers.

Each DIRECTORY was written by ``launch/convert.py --target``; the package loads its model. Softmax attention, for which the
package calls FlashAttention, is PyTorch's here.
"""

import json
import os
import pathlib
import sys

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import torch
from triton.runtime import autotuner, interpreter

from tests.conversion import fla_reference as reference

LENGTHS = (21, 80)
LENGTHS_OF_HGRN = (21, 300)


def attention(q, k, v, causal, window_size):
    """Stands in for ``flash_attn_func``: ``[B, T, H, K]``."""
    assert causal
    age = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None]
    seen = (age >= 0) & ((age <= window_size[0]) if window_size[0] >= 0 else True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return o.transpose(1, 2)


def load():
    """Imports the package and supplies what the interpreter lacks."""
    # Without a GPU, configurations cannot be timed: the first is taken.
    autotuner.Autotuner._bench = lambda self, *arguments, config, **meta: (0.0, 0.0, 0.0)
    autotuner.Autotuner.do_bench = property(lambda self: None, lambda self, value: None)
    import fla
    import fla.layers.attn
    import fla.models
    import transformers
    from fla.ops.common import chunk_delta_h, chunk_h
    from fla.ops.hgrn import chunk as chunk_hgrn

    fla.layers.attn.flash_attn_func = attention
    # Kernel loops count in Python integers, which lack the methods of tensors.
    for module in (chunk_h, chunk_delta_h, chunk_hgrn):
        module.range = lambda *bounds: map(interpreter._implicit_cvt, range(*bounds))
    for package in (fla, torch, transformers):
        print(package.__name__, package.__version__)
    return fla, transformers


def mode(fields):
    """The chunked kernels of the first two do not take float32; hgrn uses its chunked kernel only if told to."""
    modes = {"delta_net": "fused_recurrent", "gated_deltaproduct": "fused_recurrent", "hgrn": "chunk"}
    return {"attn_mode": modes[fields["model_type"]]} if fields["model_type"] in modes else {}


def compare(name, model, fields, tensors):
    """The largest difference between logits."""
    tied = {"lm_head.weight"} if fields.get("tie_word_embeddings") else set()
    theirs = {key: tuple(x.shape) for key, x in model.state_dict().items() if key not in tied}
    assert theirs == reference.shapes(fields), f"{name}: {set(theirs.items()) ^ set(reference.shapes(fields).items())}"
    for length in LENGTHS_OF_HGRN if fields["model_type"] == "hgrn" else LENGTHS:
        tokens = np.random.default_rng(1).integers(0, reference.VOCABULARY, (2, length))
        expected = reference.logits(fields, tensors, tokens)
        with torch.no_grad():
            found = model(torch.tensor(tokens), use_cache=False).logits.numpy()
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        print(f"{name}, {length} tokens: {difference:.1e} of {np.abs(expected).max():.2f}", flush=True)
        assert difference < 1e-4


def compare_with_transformers(name, model, other):
    """Compares a Mamba with transformers' model; the two name the epsilon differently."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
            )
        model.load_state_dict(other.state_dict())
        tokens = torch.tensor(reference.TOKENS)
        found, expected = (x.eval()(tokens, use_cache=False).logits for x in (model, other))
    difference = (found - expected).abs().max() / expected.abs().max()
    print(f"{name}: {difference:.1e} of {expected.abs().max():.2f}")
    assert difference < 1e-5


def compare_mambas(fla, transformers):
    sizes = {"hidden_size": 24, "state_size": 10, "num_hidden_layers": 3, "vocab_size": reference.VOCABULARY}
    heads = {"head_dim": 12, "num_heads": 4, "n_groups": 1, "chunk_size": 8}
    for name, more in (("Mamba", {}), ("Mamba2", heads)):
        made = []
        for package, epsilon in ((fla.models, "norm_eps"), (transformers, "layer_norm_epsilon")):
            config = getattr(package, f"{name}Config")(**sizes, **more, **{epsilon: 1e-2})
            made.append(getattr(package, f"{name}ForCausalLM")(config))
        compare_with_transformers(name, *made)


def main():
    torch.set_num_threads(1)
    fla, transformers = load()
    compare_mambas(fla, transformers)
    for name, fields in reference.MODELS.items():
        config = transformers.AutoConfig.for_model(**fields | mode(fields))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        tensors = reference.draw(fields)
        loaded = model.load_state_dict({key: torch.tensor(x) for key, x in tensors.items()}, strict=False)
        assert not loaded.unexpected_keys, loaded
        compare(name, model, fields, tensors)
    for directory in map(pathlib.Path, sys.argv[1:]):
        fields = json.loads((directory / "config.json").read_text())
        options = {"output_loading_info": True, "dtype": torch.float32}
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, **options, **mode(fields))
        assert not any(loaded.values()), loaded
        tensors = {key: x.numpy() for key, x in model.state_dict().items()}
        compare(directory.name, model.eval(), fields, tensors)


if __name__ == "__main__":
    main()
