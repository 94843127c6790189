"""Published model sizes, by name. A preset gives the ``model`` section of a config all that its shapes follow from."""

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
    # Two cores, ten minutes: what `make quickstart` trains, and what the step benchmarks are run on.
    "griffin_2m": _griffin(_GRIFFIN, (192, 192, 3, 3), window=512, vocab_size=2048),
    "hawk_6m": _griffin(("rg_lru",), (256, 256, 6, 4), window=512, vocab_size=4096),
    "griffin_6m": _griffin(_GRIFFIN, (256, 256, 6, 4), window=512, vocab_size=4096),
}


def find(name: str) -> dict[str, Any]:
    """The preset's values, by keys of the ``model`` section."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
