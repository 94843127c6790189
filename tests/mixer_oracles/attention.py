"""Full softmax attention, and the gated convolution of Based (Arora et al., arXiv:2402.18668)."""

import dataclasses

from tests import oracles
from tests.mixer_oracles import griffin


def attention(parameters, x, ids, config):
    """Sliding-window attention with a window that holds everything."""
    return griffin.sliding_window(parameters, x, ids, dataclasses.replace(config, window=x.shape[1]))


def convolution(parameters, x, ids, config):
    inner = oracles.linear(parameters["input"], x)
    inner, _ = oracles.causal_convolution(inner, parameters["convolution"]["convolution_kernel"], ids=ids)
    gated = inner * oracles.sigmoid(inner) * oracles.linear(parameters["gate"], x)
    return oracles.linear(parameters["out"], gated)


ORACLES = {"attention": attention, "convolution": convolution}
