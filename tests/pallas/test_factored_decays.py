"""Decays of key channels as two factors, in a chunk or its parts: the same as by halves if none is strong. Kernels take
each of the code paths."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.models import ModelConfig, parameters, presets
from jaxlinear.models.mixers import delta_net
from jaxlinear.pallas.delta_rule import blocks as delta_rule_blocks
from jaxlinear.pallas.linear_attention import blocks as linear_attention_blocks
from jaxlinear.pallas.parts import factored_decays
from jaxlinear.pallas.parts.channel_decays import ByChannel
from jaxlinear.pallas.parts.factored_decays import (
    LIMIT,
    Factored,
    FactoredInFours,
    FactoredInParts,
    FactoredInSmallParts,
)
from jaxlinear.parallel import operations
from tests import numerics
from tests.ops import test_delta_rule
from tests.pallas import kernel_cases

C, K = 64, 4

# Each channel's sum of decays over a chunk or part: nearly all that is allowed, hardly any, little; and all in one step.
SHARES = np.array([1.9 * LIMIT, 1e-6, 3.2, 0])


def draw(random, part: int) -> np.ndarray:
    """Log decays ``[C, K]``, as strong as is allowed in each part of a chunk."""
    log_decay = -random.uniform(0, 1, (C, K)) * SHARES / part
    log_decay[part // 2 :: part, 3] = -0.99 * LIMIT
    return log_decay


def by_both(kind, random, log_decay):
    """All that kernels take from the class ``kind``, and the same by halves."""
    rows, columns, d = ([random.standard_normal(s) for _ in range(2)] for s in ((C, K), (C, K), (C, C)))

    def everything(kind, log_decay, rows, columns, d):
        decays, (columns, of_columns) = kind(log_decay), columns
        products = decays.pairwise(tuple(rows), columns, jnp.float64)
        gradients = decays.gradients(tuple(rows), columns, d, (rows, of_columns), C - 1, jnp.float64)
        ends = [decay(x, None) for decay, x in ((decays.from_start, rows[0]), (decays.to_end, columns))]
        return ends, decays.whole, products, gradients

    return [
        numerics.run(jax.jit(functools.partial(everything, each)), log_decay, rows, columns, d, dtype="float64")
        for each in (kind, ByChannel)
    ]


@pytest.mark.parametrize("kind", [Factored, FactoredInParts, FactoredInSmallParts])
def test_one_factor_each_gives_what_halves_give(kind):
    random, part = np.random.default_rng(0), kind.part or C
    log_decay = draw(random, part)
    assert (log_decay.sum(axis=0) < -LIMIT).any() == (part < C)
    numerics.assert_close(*by_both(kind, random, log_decay), 1e-12)


@pytest.mark.parametrize("strongest, tolerance", [(24 * math.log(2), 1e-12), (math.inf, 2**-21)])
def test_any_decay_in_fours(strongest, tolerance):
    """Down to 2^-24 from a token to the next as by halves; 0 for less, up to 2^-24 of each of the terms, some of which are
    above 3."""
    random = np.random.default_rng(2)
    log_decay = -random.uniform(0, 1, (C, K)) * np.array([strongest if np.isfinite(strongest) else 60, 30, 1, 0])
    log_decay[::5, 2] = -strongest
    log_decay = np.maximum(log_decay, -strongest)
    assert (log_decay[:, 2] == -strongest).sum() == 13
    both = by_both(FactoredInFours, random, log_decay)
    numerics.assert_close(*both, tolerance)
    if not np.isfinite(strongest):
        with pytest.raises(AssertionError):
            numerics.assert_close(*both, 1e-12)


@pytest.mark.parametrize("factor, expected", [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("part", [C, FactoredInParts.part, FactoredInSmallParts.part])
def test_the_limit_is_of_a_channel_in_a_chunk_or_part(part, factor, expected):
    weak = np.full((C, K), -0.01, np.float32)
    other = weak.copy()
    other[:, 1] = -factor * LIMIT / part
    log_decays = [jnp.asarray(weak), jnp.asarray(other)]
    assert bool(factored_decays.within(log_decays, part)) == expected
    assert bool(factored_decays.within(log_decays)) == (expected and part == C)


def test_kda_begins_with_decays_that_are_weak_in_parts_alone(monkeypatch):
    found = []

    def delta_rule(*arguments, **options):
        found.append(arguments[4])
        return operations.delta_rule(*arguments, **options)

    monkeypatch.setattr(delta_net, "operations", SimpleNamespace(**vars(operations) | {"delta_rule": delta_rule}))
    architecture = parameters.describe(ModelConfig(**presets.find("kda_6m"), dtype="float32"))
    model = architecture.bind(jax.jit(architecture.initialise)(jax.random.key(0))).unstacked()
    model.hidden(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 256)))
    assert len(found) == model.config.num_layers
    for log_decay in found:
        chunks = [log_decay[0, n : n + 128].reshape(128, -1) for n in (0, 128)]
        assert not any(factored_decays.within([chunk]) for chunk in chunks)
        assert factored_decays.within(chunks, FactoredInParts.part)


def test_only_narrow_numbers_with_as_large_exponents_are_taken():
    assert factored_decays.takes(jnp.bfloat16, jnp.float32)
    assert not factored_decays.takes(jnp.float32, jnp.float32)
    assert not factored_decays.takes(jnp.float16, jnp.float32)


@pytest.mark.slow(but=["linear_attention-in_small_parts", "delta_rule-all"])
@pytest.mark.parametrize(
    "operation, way",
    [
        *(("linear_attention", way) for way in ("weak", "in_parts", "in_small_parts", "strong", "all")),
        *(("delta_rule", way) for way in ("weak", "all")),  # which chooses by the same function
    ],
)
def test_kernels_take_each_way(monkeypatch, operation, way):
    """Four chunks, each with its own code path or all with one. The paths that must not be taken are broken."""
    small = linear_attention_blocks.Block(C, C, 1), linear_attention_blocks.Block(C, C, 1)
    monkeypatch.setattr(linear_attention_blocks, "_TPU_ELSEWHERE", small)
    monkeypatch.setattr(delta_rule_blocks, "_TPU_ELSEWHERE", delta_rule_blocks.Block(C, C, 1))
    ways = {
        "weak": (Factored, 0.0),
        "in_parts": (FactoredInParts, 2.0),
        "in_small_parts": (FactoredInSmallParts, 4.0),
        "strong": (FactoredInFours, 10.0),
    }
    whole = {kind: kind.pairwise for kind, _ in ways.values()}  # one may inherit it from another
    for name, (kind, _) in ways.items():
        broken = way not in (name, "all")
        pairwise = (lambda self, rows, *_: [jnp.full((C, C), jnp.nan)] * len(rows)) if broken else whole[kind]
        monkeypatch.setattr(kind, "pairwise", pairwise)
    random = np.random.default_rng(1)
    *inputs, _, state = kernel_cases.draw(operation, random, "none", 4 * C, 2, 8, 8)
    if operation == "linear_attention":
        inputs[1] = test_delta_rule.unit(inputs[1])
    log_decay = -random.uniform(0, 0.5, inputs[0].shape)
    for n, name in enumerate(ways if way == "all" else [way] * 4):
        log_decay[:, n * C : (n + 1) * C] -= ways[name][1]
    inputs = *inputs, numerics.representable(log_decay), state
    kernel_cases.assert_as_the_recurrence(operation, inputs, "bfloat16")
