"""jaxlinear: pretraining of language models of linear complexity."""

__version__ = "0.1.0"
