"""causal_attention: cases for the laws, its blocks, dtypes, and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import causal_attention, sliding_window_attention
from jaxlinear.ops.attention import op as attention
from tests import naive, numerics
from tests.ops import cases

BACKENDS = ["recurrent", "chunked"]
# name: B, T, H, G, K, V, keys in front, segments
CASES = {
    "one_token": (3, 1, 4, 1, 6, 6, 0, True),
    "one_token_after_keys": (1, 1, 4, 1, 6, 4, 30, True),
    "multi_query": (3, 7, 4, 1, 6, 6, 0, True),
    "multi_head": (1, 64, 3, 3, 4, 5, 0, True),
    "grouped": (2, 64, 4, 2, 5, 3, 0, True),
    "one_head": (3, 7, 1, 1, 4, 2, 0, False),
    "keys_in_front": (2, 40, 2, 2, 4, 4, 29, True),
    "whole": (1, 100, 2, 1, 4, 4, 0, False),
    "long": (1, 257, 2, 1, 4, 4, 0, True),
}


pytestmark = pytest.mark.usefixtures("small_blocks")


@functools.cache
def case(name):
    *shape, past, packed = CASES[name]
    length = shape[1]
    return cases.attention(*shape, past + length, past, packed, chance=0.03, seed=length)


RUNS = [
    *((name, dtype, "chunked") for name, dtype in numerics.each_dtype(CASES, "grouped", "keys_in_front", "long")),
    *(
        (name, dtype, "recurrent")
        for name, dtype in numerics.each_dtype(["one_token", "grouped", "long"], "keys_in_front")
    ),
]


def options(name, backend):
    return {"backend": backend}


@pytest.mark.parametrize("blocks", [(256, 512), (7, 64), (100, 9), (1, 1)])
def test_blocks_change_nothing(blocks, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(attention, "KEY_RUN", blocks[1])
    inputs, cotangents, ids, outputs, gradients = case("keys_in_front")
    run = numerics.with_gradients(functools.partial(causal_attention, segment_ids=ids))
    found = numerics.run(run, inputs, cotangents, dtype="float64")
    numerics.assert_close(found, (outputs, gradients), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_bfloat16_are_not_rounded_to_it(backend):
    """They are 256 and 257, of which only the first is a bfloat16 number; the log-sum-exps are larger."""
    length = 40
    odd = np.arange(length) % 2
    q, k = np.ones((1, length, 1, 2)), np.stack([np.full(length, 256.0), odd], axis=1)[None, :, None]
    v, cotangents = odd[None, :, None, None] * 1.0, (np.arange(length) == length - 1)[None, :, None, None] * 1.0
    weights = np.exp(odd) / np.sum(np.exp(odd))  # of the last query, the only one with a cotangent
    run = numerics.with_gradients(functools.partial(causal_attention, scale=1.0, backend=backend))
    o, (_, _, dv) = numerics.run(run, (q, k, v), cotangents, dtype="bfloat16")
    numerics.assert_close(o[0, -1, 0, 0], np.sum(weights * odd), 5e-3)
    numerics.assert_close(dv[0, :, 0, 0], weights, 5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_bfloat16_are_float32(backend):
    """Sums with equal weights: of values and, over as many queries, of a value's gradient."""
    length = 1000
    inputs = tuple(np.full((1, length, 1, 1), value) for value in (0.0, 0.0, 1.0))
    run = numerics.with_gradients(functools.partial(causal_attention, backend=backend))
    o, (_, _, dv) = numerics.run(run, inputs, np.ones((1, length, 1, 1)), dtype="bfloat16")
    assert np.all(numerics.wide(o) == 1)
    numerics.assert_close(dv[0, 0, 0, 0], np.sum(1 / np.arange(1, length + 1)), 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtypes", ["float64 bfloat16 float64", "bfloat16 float64 float32", "bfloat16 float32 bfloat16"]
)
def test_dtypes_may_differ(dtypes, backend):
    """Products are in a dtype that holds them all; each gradient is in the dtype of its input."""
    random, length = np.random.default_rng(5), 40
    inputs = [numerics.normal(random, 1, length, heads, 3) for heads in (2, 1, 1)]
    cotangents = numerics.normal(random, 1, length, 2, 3)
    reference = numerics.with_gradients(functools.partial(naive.sliding_window_attention, window=length))
    expected, expected_gradients = numerics.wide(numerics.run(reference, inputs, cotangents, dtype="float64"))
    dtypes = dtypes.split()
    with jax.enable_x64(True):
        given = tuple(jnp.asarray(x, dtype) for x, dtype in zip(inputs, dtypes, strict=True))
        for run in (causal_attention, functools.partial(sliding_window_attention, window=length)):
            o, gradients = numerics.with_gradients(functools.partial(run, backend=backend))(given, cotangents)
            assert [x.dtype for x in (*gradients, o)] == [*dtypes, dtypes[2]]
            numerics.assert_close(o, expected, numerics.TOLERANCES[dtypes[2]])
            for found, exact, dtype in zip(gradients, expected_gradients, dtypes, strict=True):
                numerics.assert_close(found, exact, numerics.TOLERANCES["bfloat16" if "bfloat16" in dtypes else dtype])


@pytest.mark.parametrize("length", [2048, 65_536])
def test_memory_grows_with_the_length(length, monkeypatch):
    """Forward and backward, with the default blocks: one T x T matrix of logits would be 17 GB at the greater length."""
    monkeypatch.undo()

    def loss(q, k, v):
        return jnp.sum(causal_attention(q, k, v) ** 2)

    shapes = [jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)] * 3
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()
    one = 4 * length * 4 * 64  # bytes of one of the inputs
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * one + 20e6


def test_no_masks_of_all_pairs_are_kept_for_scanned_layers():
    """If layers are scanned and recomputed, masks do not depend on the layer: they would be computed once and kept."""
    length = 4096

    def objective(x, ids):
        def layer(x, _):
            return causal_attention(x, x, x, segment_ids=ids), None

        step = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        return jnp.sum(jax.lax.scan(step, x, None, length=2)[0])

    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(jax.grad(objective)).lower(x, ids).compile()
    # One byte per pair of the lower half would be 8 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4e6
