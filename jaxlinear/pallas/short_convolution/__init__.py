"""Kernels of the short convolution."""
