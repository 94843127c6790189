"""delta_rule with several updates per token: the same as several tokens with one update each, of which the last is read."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.ops import delta_rule
from tests import naive, numerics, oracles
from tests.ops import test_delta_rule as operation


@functools.cache
def updates_case(kind):
    """Three updates per token: inputs, cotangents, ids and, from the oracles on 39 tokens of one update each, outputs and
    gradients. Of every three such tokens only the first decays the state, and only the last one's output is taken."""
    batch, length, heads, updates, width, value_width = 2, 13, 2, 3, 4, 5
    random = np.random.default_rng(7)
    q = numerics.normal(random, batch, length, heads, width)
    state = numerics.normal(random, batch, heads, width, value_width)
    k = operation.unit(numerics.normal(random, batch, length, heads, updates, width))
    v = numerics.normal(random, batch, length, heads, updates, value_width)
    beta = numerics.uniform(random, batch, length, heads, updates, high=1.9)
    ids = np.array([[0] * length, [3, 4, 4, 4, 4, 4, 5, 5, 3, 3, 3, 4, 3]], np.int32)
    inputs = q, k, v, beta, operation.draw_decay(random, kind, batch, length, heads, width), state

    def flat(q, k, v, beta, log_decay, state):
        k, v, beta = (jnp.moveaxis(x, 3, 2).reshape(batch, length * updates, heads, *x.shape[4:]) for x in (k, v, beta))
        if log_decay is not None:
            log_decay = (
                jnp.zeros((batch, length * updates, *log_decay.shape[2:]), q.dtype).at[:, ::updates].set(log_decay)
            )
        return jnp.repeat(q, updates, axis=1), k, v, beta, log_decay, state

    def reference(*inputs):
        o, final = naive.delta_rule(*flat(*inputs), ids=np.repeat(ids, updates, axis=1))
        return o[:, updates - 1 :: updates], final

    of_one_update = numerics.wide(numerics.run(flat, *inputs, dtype="float64"))
    o, final = oracles.delta_rule(*of_one_update, np.repeat(ids, updates, axis=1))
    outputs = o[:, updates - 1 :: updates], final
    cotangents = numerics.cotangents_like(random, outputs)
    found, gradients = numerics.run(numerics.with_gradients(reference), inputs, cotangents, dtype="float64")
    numerics.assert_close(found, outputs, 1e-12)
    return inputs, cotangents, ids, outputs, numerics.wide(gradients)


@pytest.mark.parametrize(
    "backend, chunk, kind, dtype",
    [
        ("recurrent", None, "scalar", "float64"),
        ("recurrent", None, "none", "bfloat16"),
        ("chunked", 7, "none", "float64"),
        ("chunked", 1, "scalar", "float64"),
        ("chunked", None, "channel", "float64"),
        ("chunked", None, "scalar", "bfloat16"),
        ("pallas", 16, "scalar", "float64"),
        ("pallas", None, "none", "bfloat16"),
    ],
)
def test_updates_of_a_token_are_tokens_of_one_update(backend, chunk, kind, dtype):
    inputs, cotangents, ids, outputs, gradients = updates_case(kind)
    options = {"chunk_size": chunk, "backend": backend, "negative_eigenvalues": True}
    run = functools.partial(delta_rule, segment_ids=ids, **options)
    found, found_gradients = numerics.run(numerics.with_gradients(run), inputs, cotangents, dtype=dtype)
    numerics.assert_close(found, outputs, numerics.TOLERANCES[dtype])
    numerics.assert_close(found_gradients, gradients, numerics.TOLERANCES[dtype])
    assert found[0].dtype == dtype
