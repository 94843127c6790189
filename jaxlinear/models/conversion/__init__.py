"""Weights of other programs: RecurrentGemma, Mamba-2 and Llama of Hugging Face, and RecurrentGemma's Flax checkpoints."""

from jaxlinear.models.conversion.convert import LAYOUTS, export_weights, import_weights

__all__ = ["LAYOUTS", "export_weights", "import_weights"]
