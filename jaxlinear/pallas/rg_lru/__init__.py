"""Kernels of the RG-LRU."""
