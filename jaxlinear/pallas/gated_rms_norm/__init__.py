"""Kernels of the gated RMSNorm."""
