"""Flax NNX modules: mixers, blocks, the language model, and its published sizes."""

from jaxlinear.models.config import ModelConfig
from jaxlinear.models.language_model import LanguageModel
from jaxlinear.models.loading import load

__all__ = ["LanguageModel", "ModelConfig", "load"]
