"""Kernels of diagonal recurrences."""
