"""Conversion from and to other programs: RecurrentGemma, Mamba, Falcon-Mamba, Mamba-2, Llama and Mistral of Hugging Face,
models of flash-linear-attention, and RecurrentGemma's Flax checkpoints."""

from jaxlinear.conversion.convert import LAYOUTS, export_weights, import_weights

__all__ = ["LAYOUTS", "export_weights", "import_weights"]
