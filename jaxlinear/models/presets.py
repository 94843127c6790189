"""Published model sizes, by name. A preset gives all keys of a config's ``model`` section that determine its shapes."""

from typing import Any

from jaxlinear.errors import UserError

_GRIFFIN = ("rg_lru", "rg_lru", "sliding_window")

# De et al. 2024 (arXiv:2402.19427), table 1: width, recurrent width, depth, heads.
_GRIFFIN_SIZES = {
    "100m": (768, 1024, 12, 6),
    "200m": (1024, 1536, 12, 8),
    "400m": (1536, 2048, 12, 12),
    "1b3": (2048, 2560, 24, 16),
    "3b": (3072, 4096, 24, 24),
    "7b": (4096, 5632, 32, 32),
    "14b": (5120, 8192, 40, 40),
}


def _griffin(pattern: tuple[str, ...], size: tuple[int, int, int, int], **changes: Any) -> dict[str, Any]:
    width, recurrent_width, num_layers, num_heads = size
    preset = {
        "pattern": pattern,
        "num_layers": num_layers,
        "vocab_size": 32_000,
        "width": width,
        "recurrent_width": recurrent_width,
        "num_heads": num_heads,
        "window": 1024,
        "embedding_scale": False,
        "logit_soft_cap": 0.0,
    }
    return preset | changes


def _mamba(mixer: str, width: int, num_layers: int, **changes: Any) -> dict[str, Any]:
    preset = {
        "pattern": (mixer,),
        "num_layers": num_layers,
        "vocab_size": 50_280,
        "width": width,
        "recurrent_width": 2 * width,
        "num_heads": width // 64,  # of attention, if a hybrid has it
        "channel_mixer": "none",
        "norm_epsilon": 1e-5,
    }
    return preset | changes


def _mamba2(width: int, num_layers: int, **changes: Any) -> dict[str, Any]:
    preset = {
        "pattern": ("mamba2",),
        "num_layers": num_layers,
        "vocab_size": 50_288,
        "width": width,
        "recurrent_width": 2 * width,
        "num_heads": 2 * width // 64,
        "key_width": 128,
        "value_width": 64,
        "channel_mixer": "none",
        "norm_epsilon": 1e-5,
    }
    return preset | changes


def _swiglu(mixer: str, width: int, num_layers: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    preset = {
        "pattern": (mixer,),
        "num_layers": num_layers,
        "vocab_size": 32_000,
        "width": width,
        "recurrent_width": width,
        "num_heads": num_heads,
        "mlp_expansion": 2.75,
        "mlp_activation": "silu",
        "bias": False,
    }
    return preset | changes


def _attending(pattern: tuple[str, ...], width: int, num_layers: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """With softmax attention as in Llama: multi-head, with rotary positions on whole heads."""
    attention = {"pattern": pattern, "key_value_heads": num_heads, "rotary_fraction": 1.0}
    return _swiglu("attention", width, num_layers, num_heads) | attention | changes


def _placed(num_layers: int, others: str, **places: tuple[int, ...]) -> tuple[str, ...]:
    """A pattern as long as the model: each mixer at its places, counted from 0, and ``others`` elsewhere."""
    at = {place: mixer for mixer, where in places.items() for place in where}
    return tuple(at.get(layer, others) for layer in range(num_layers))


def _based(width: int, num_layers: int, linear: tuple[int, ...]) -> dict[str, Any]:
    """``linear``: the layers of linear attention; each is followed by a window."""
    windows = tuple(layer + 1 for layer in linear)
    return _attending(
        _placed(num_layers, "convolution", linear_attention=linear, sliding_window=windows),
        width,
        num_layers,
        16,
        vocab_size=50_264,
        recurrent_width=2 * width,
        window=64,
        feature_map="taylor",
        mlp_expansion=2.0,
        convolution_width=3,
        norm_epsilon=1e-5,
    )


def _samba(width: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return _attending(
        ("mamba", "sliding_window"),
        width,
        num_layers,
        num_heads,
        recurrent_width=2 * width,
        window=2048,
        mlp_expansion=8 / 3,
        norm_epsilon=1e-5,
    )


def _linear_moe(width: int, expert_width: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return _swiglu(
        "gla",
        width,
        num_layers,
        num_heads,
        vocab_size=151_936,
        tied_embeddings=False,
        channel_mixer="mixture_of_experts",
        experts=64,
        experts_per_token=8,
        expert_width=expert_width,
    )


def _diagonal(mixer: str, width: int, num_layers: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    preset = {
        "pattern": (mixer,),
        "num_layers": num_layers,
        "vocab_size": 32_000,
        "width": width,
        "recurrent_width": width,
        "num_heads": num_heads,
    }
    return preset | changes


PRESETS: dict[str, dict[str, Any]] = {
    **{f"hawk_{name}": _griffin(("rg_lru",), size) for name, size in _GRIFFIN_SIZES.items()},
    **{f"griffin_{name}": _griffin(_GRIFFIN, size) for name, size in _GRIFFIN_SIZES.items()},
    # RecurrentGemma (arXiv:2404.07839, table 1) and the 9B of its second release.
    **{
        f"recurrentgemma_{name}": _griffin(
            _GRIFFIN, size, window=2048, vocab_size=256_000, embedding_scale=True, logit_soft_cap=30.0
        )
        for name, size in {"2b": (2560, 2560, 26, 10), "9b": (4096, 4096, 38, 16)}.items()
    },
    # Gu and Dao 2023 (arXiv:2312.00752), as published (huggingface.co/state-spaces/mamba-130m and so on): width and depth.
    # The vocabulary of 50,277 words is padded to a multiple of 8.
    **{
        f"mamba_{name}": _mamba("mamba", *size)
        for name, size in {
            "130m": (768, 24),
            "370m": (1024, 48),
            "790m": (1536, 48),
            "1b4": (2048, 48),
            "2b8": (2560, 64),
        }.items()
    },
    # Zuo et al. 2024 (arXiv:2410.05355), as published (huggingface.co/tiiuae/falcon-mamba-7b).
    "falcon_mamba_7b": _mamba(
        "mamba", 4096, 64, vocab_size=65_024, tied_embeddings=False, selection_norm=True, selection_norm_epsilon=1e-6
    ),
    # Dao and Gu 2024 (arXiv:2405.21060), as published (huggingface.co/state-spaces/mamba2-130m and so on): width and depth.
    # The vocabulary of 50,277 words is padded to a multiple of 16.
    **{
        f"mamba2_{name}": _mamba2(*size)
        for name, size in {
            "130m": (768, 24),
            "370m": (1024, 48),
            "780m": (1536, 48),
            "1b3": (2048, 48),
            "2b7": (2560, 64),
        }.items()
    },
    # Yang et al. 2024 (arXiv:2406.06484), by the configs that the authors published: delta_net_340M.json of
    # github.com/fla-org/flame, and the defaults of DeltaNetConfig of github.com/fla-org/flash-linear-attention.
    "delta_net_340m": _swiglu("delta_net", 1024, 24, 8, tied_embeddings=False),
    "delta_net_1b3": _swiglu("delta_net", 2048, 24, 16, tied_embeddings=False),
    # Yang, Kautz and Hatamizadeh 2024 (arXiv:2412.06464), by GatedDeltaNet_1.3B of github.com/NVlabs/GatedDeltaNet.
    "gated_delta_net_1b3": _swiglu(
        "gated_delta_net", 2400, 16, 16, recurrent_heads=9, mlp_expansion=5888 / 2400, norm_epsilon=1e-5
    ),
    # Yang et al. 2023 (arXiv:2312.06635), by the configs that the authors published, gla_340M.json and gla_1B.json of
    # github.com/sustcsonglin/flash-linear-attention; K is half of D in both, as in the paper.
    "gla_340m": _swiglu("gla", 1024, 24, 4),
    "gla_1b3": _swiglu("gla", 2048, 24, 4, tied_embeddings=False),
    # Sun et al. 2023 (arXiv:2307.08621), Qin et al. 2023 (arXiv:2311.04823) and 2024 (arXiv:2404.07904), by the defaults of
    # RetNetConfig, HGRNConfig and HGRN2Config of github.com/fla-org/flash-linear-attention. Models of 1.3 B were published
    # with the defaults of the first and the last; we have not seen the config of HGRN's.
    "retnet_1b3": _swiglu("retention", 2048, 24, 8, mlp_expansion=1.375, rotary_fraction=1.0, tied_embeddings=False),
    "hgrn_1b3": _swiglu("hgrn", 2048, 24, 16, tied_embeddings=False),
    "hgrn2_1b3": _swiglu("hgrn2", 2048, 24, 16, tied_embeddings=False),
    # Sun et al. 2025 (arXiv:2503.05447), table 2, with GLA; untied embeddings and no biases, as in
    # examples/linear_moe_qwen2 of github.com/OpenSparseLLMs/Linear-MoE. The names count parameters without embeddings.
    "linear_moe_a0b3_2b": _linear_moe(1024, 896, 12, 8),
    "linear_moe_a1b_7b": _linear_moe(2048, 1024, 16, 16),
    # Not a published model: S5 was not trained on text. The layer of Smith et al. 2022 (arXiv:2208.04933) with P = D and
    # blocks of 64, in the residual blocks and at the size of a small language model.
    "s5_small": _diagonal("s5", 512, 12, 8),
    # Llama's architecture (arXiv:2302.13971), the baseline of the papers of GLA and DeltaNet ("Transformer++"), by
    # transformer_340M.json and transformer_1B.json of github.com/fla-org/flame.
    "transformer_340m": _attending(("attention",), 1024, 24, 16, tied_embeddings=False),
    "transformer_1b3": _attending(("attention",), 2048, 24, 32, tied_embeddings=False),
    # Ren et al. 2024 (arXiv:2406.07522), by Samba_421M and Samba_1.3B of github.com/microsoft/Samba, whose embeddings are
    # tied.
    "samba_421m": _samba(1536, 12, 12),
    "samba_1b3": _samba(2304, 18, 18),
    # The other hybrids of the papers of DeltaNet (arXiv:2406.06484) and Samba, which alternate with windows, at the sizes
    # of delta_net_340m and gla_340m. Ours: the attention heads of transformer_340m and the window of Samba.
    "gla_hybrid_340m": _attending(("gla", "sliding_window"), 1024, 24, 16, recurrent_heads=4, window=2048),
    "delta_net_hybrid_340m": _attending(
        ("delta_net", "sliding_window"), 1024, 24, 16, recurrent_heads=8, window=2048, tied_embeddings=False
    ),
    # DeltaNet with two layers of full attention, the second layer and the one after the middle, as in its paper.
    "delta_net_global_340m": _attending(
        _placed(24, "delta_net", attention=(1, 12)), 1024, 24, 16, recurrent_heads=8, tied_embeddings=False
    ),
    # Arora et al. 2024 (arXiv:2402.18668), by based-360m.yaml and based-1b.yaml of github.com/HazyResearch/based. The
    # window of 64 is that of the paper; the models that were released look back 128 tokens.
    "based_360m": _based(1024, 27, (1, 6, 11, 16, 21)),
    "based_1b3": _based(1792, 36, (1, 6, 11, 16, 21, 27, 33)),
    # Linear-Llama3 of LASP-2H (Sun et al. 2025, arXiv:2502.07563): one layer in four has full attention, by the 1B of
    # examples/linear_llama3 of github.com/OpenSparseLLMs/Linear-MoE. Of the feature maps and gates that it offers, we use
    # the plain one; the vocabulary, tied, and the base of the positions are those of Llama 3.2 1B.
    "linear_llama3_1b": _attending(
        (*("linear_attention",) * 3, "attention"),
        2048,
        16,
        32,
        vocab_size=128_256,
        key_value_heads=8,
        mlp_expansion=4.0,
        rotary_base=500_000.0,
        norm_epsilon=1e-5,
    ),
    # For two cores and ten minutes: what `make quickstart` trains, and what the step benchmarks run on.
    "griffin_2m": _griffin(_GRIFFIN, (192, 192, 3, 3), window=512, vocab_size=2048),
    "hawk_6m": _griffin(("rg_lru",), (256, 256, 6, 4), window=512, vocab_size=4096),
    "griffin_6m": _griffin(_GRIFFIN, (256, 256, 6, 4), window=512, vocab_size=4096),
    "transformer_6m": _attending(("attention",), 256, 6, 4, vocab_size=4096),
    "longhorn_6m": _mamba("longhorn", 256, 10, vocab_size=4096),
    "mamba_6m": _mamba("mamba", 256, 10, vocab_size=4096),
    "mamba2_6m": _mamba2(256, 10, vocab_size=4096),
    "delta_net_6m": _swiglu("delta_net", 256, 6, 4, vocab_size=4096),
    "gated_delta_net_6m": _swiglu("gated_delta_net", 256, 6, 4, mlp_expansion=2.25, vocab_size=4096),
    "kda_6m": _swiglu("kda", 256, 6, 4, mlp_expansion=2.5, vocab_size=4096),
    "gla_6m": _swiglu("gla", 256, 6, 4, vocab_size=4096),
    "hgrn_6m": _swiglu("hgrn", 256, 6, 4, vocab_size=4096),
    "hgrn2_6m": _swiglu("hgrn2", 256, 6, 2, vocab_size=4096),
    "lightning_6m": _swiglu("lightning", 256, 6, 4, vocab_size=4096),
    "linear_attention_6m": _swiglu("linear_attention", 256, 6, 4, feature_map="elu", vocab_size=4096),
    "retnet_6m": _swiglu("retention", 256, 6, 4, mlp_expansion=1.375, rotary_fraction=1.0, vocab_size=4096),
    "s5_6m": _diagonal("s5", 256, 6, 4, vocab_size=4096),
    "lru_6m": _diagonal("lru", 256, 6, 4, recurrent_width=128, vocab_size=4096),
    "gateloop_6m": _diagonal("gateloop", 256, 6, 4, mlp_expansion=2.0, vocab_size=4096),
}


def find(name: str) -> dict[str, Any]:
    """The preset's values, by keys of the ``model`` section."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
