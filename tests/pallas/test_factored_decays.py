"""Decays of key channels as two factors: the same as by halves where no decay is strong; and kernels that take either."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import delta_rule, linear_attention
from jaxlinear.pallas import blocks, factored_decays
from jaxlinear.pallas.channel_decays import ByChannel
from jaxlinear.pallas.factored_decays import LIMIT, Factored
from tests import numerics

C, K = 32, 4


def test_one_factor_each_gives_what_halves_give():
    random = np.random.default_rng(0)
    # A third of the channels decay by nearly all that is allowed, a third hardly, and one in a single step.
    log_decay = -random.uniform(0, 1, (C, K)) * np.array([1.9 * LIMIT / C, 1e-7, 0.1, 0])
    log_decay[C // 2, 3] = -0.99 * LIMIT
    rows, columns, d = ([random.standard_normal(s) for _ in range(2)] for s in ((C, K), (C, K), (C, C)))

    def everything(kind, log_decay, rows, columns, d):
        decays, (columns, _) = kind(log_decay), columns
        products = decays.pairwise(tuple(rows), columns, jnp.float64)
        gradients = decays.pairwise_gradient(tuple(rows), columns, d, jnp.float64)
        return decays.since_start, decays.until_end, decays.whole, products, gradients

    found, expected = (
        numerics.run(jax.jit(functools.partial(everything, kind)), log_decay, rows, columns, d, dtype="float64")
        for kind in (Factored, ByChannel)
    )
    numerics.assert_close(found, numerics.wide(expected), 1e-12)


@pytest.mark.parametrize("factor, expected", [(0.99, True), (1.01, False)])
def test_the_limit_is_of_a_channel_in_a_chunk(factor, expected):
    weak = np.full((C, K), -0.01, np.float32)
    other = weak.copy()
    other[:, 1] = -factor * LIMIT / C
    assert bool(factored_decays.within([jnp.asarray(weak), jnp.asarray(other)])) == expected


def test_only_narrow_numbers_with_as_large_exponents_are_taken():
    assert factored_decays.takes(jnp.bfloat16, jnp.float32)
    assert not factored_decays.takes(jnp.float32, jnp.float32)
    assert not factored_decays.takes(jnp.float16, jnp.float32)


@pytest.mark.parametrize("operation", [linear_attention, delta_rule], ids=lambda x: x.__name__)
@pytest.mark.parametrize("way", ["weak", "strong", "both"])
def test_kernels_take_either_way(monkeypatch, operation, way):
    """Three chunks, of which the second or all decay by too much. The way that is not to be taken is broken."""
    small = blocks.AttentionBlock(32, 32, 1), blocks.AttentionBlock(32, 32, 1)
    monkeypatch.setattr(blocks, "_LINEAR_ATTENTION_TPU_ELSEWHERE", small)
    monkeypatch.setattr(blocks, "_DELTA_RULE_TPU_ELSEWHERE", blocks.DeltaRuleBlock(32, 32, 1))
    for kind, name in ((Factored, "strong"), (ByChannel, "weak")):
        if way == name:
            monkeypatch.setattr(kind, "pairwise", lambda self, rows, *_: [jnp.full((32, 32), jnp.nan)] * len(rows))
    random = np.random.default_rng(1)
    q, k, v, state = (numerics.normal(random, *s) for s in ((1, 96, 2, 8), (1, 96, 2, 8), (1, 96, 2, 8), (1, 2, 8, 8)))
    k = numerics.representable(k / np.linalg.norm(k, axis=-1, keepdims=True))
    log_decay = -random.uniform(0, 0.5, q.shape)
    if way != "weak":
        log_decay[:, slice(32, 64) if way == "both" else slice(None)] -= 2
    log_decay = numerics.representable(log_decay)
    beta = (numerics.representable(random.uniform(0, 1, q.shape[:3])),) if operation is delta_rule else ()
    inputs = q, k, v, *beta, log_decay, state
    cotangents = numerics.normal(random, *v.shape), numerics.normal(random, *state.shape)
    results = [
        numerics.run(
            numerics.with_gradients(functools.partial(operation, backend=backend)), inputs, cotangents, dtype=dtype
        )
        for backend, dtype in (("recurrent", "float64"), ("pallas", "bfloat16"))
    ]
    numerics.assert_close(results[1], numerics.wide(results[0]), numerics.TOLERANCES["bfloat16"])
