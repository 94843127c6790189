"""Falcon-Mamba (arXiv:2410.05355) in transformers' format: Mamba with norms, without weights, of what it selects."""

from typing import Any

from jaxlinear.conversion import mamba
from jaxlinear.conversion.family import Family, Fields
from jaxlinear.models.config import ModelConfig


def _model(fields: Fields) -> dict[str, Any]:
    values, epsilon = mamba.model(fields), fields.number("mixer_rms_eps", 1e-6)
    if epsilon <= 0 < values["norm_epsilon"]:  # here 0 means the model's own
        fields.refuse("mixer_rms_eps", epsilon, "only a number above 0 can be imported")
    return values | {"selection_norm": True, "selection_norm_epsilon": epsilon}


def _fields(config: ModelConfig) -> dict[str, Any]:
    return mamba.fields_of(config, "falcon_mamba") | {
        "architectures": ["FalconMambaForCausalLM"],
        "mixer_rms_eps": config.selection_norm_epsilon or config.norm_epsilon,
    }


def _is_one(config: ModelConfig) -> bool:
    return config.selection_norm


FAMILY = Family("falcon_mamba", ("mamba",), _model, _fields, mamba.links, is_one=_is_one)
