"""Causal softmax attention, over all earlier tokens or a window of them."""
