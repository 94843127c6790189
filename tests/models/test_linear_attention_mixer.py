"""Linear attention: its feature maps, and what it divides by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlinear.models.mixers.linear_attention import LinearAttention, Rebased, _elu, _pairs, _taylor
from tests import numerics, small

MAPS = ("identity", "elu", "relu", "taylor", "rebased", "hedgehog")


def shapes(**changes):
    _, parameters = small.module(lambda rngs: LinearAttention(small.config(**changes), rngs=rngs))
    return jax.tree.map(np.shape, parameters)


def test_the_kernels_that_the_maps_stand_for():
    random = np.random.default_rng(0)
    q, k = numerics.normal(random, 2, 3, 1, 6), numerics.normal(random, 2, 3, 1, 6)
    product = np.sum(q * k, axis=-1)

    def kernel(phi):
        return numerics.run(lambda q, k: jnp.sum(phi(q) * phi(k), axis=-1), q, k, dtype="float64")

    numerics.assert_close(kernel(_pairs), product**2, 1e-12)
    s = product / np.sqrt(6)
    numerics.assert_close(kernel(_taylor), 1 + s + s**2 / 2, 1e-12)
    near = numerics.run(lambda q, k: jnp.sum(_taylor(q) * _taylor(k), axis=-1), q / 10, k / 10, dtype="float64")
    numerics.assert_close(near, np.exp(s / 100), 1e-4)  # the first terms of the exponential
    centred = [(y - y.mean(axis=-1, keepdims=True)) / np.sqrt(y.var(axis=-1, keepdims=True) + 1e-5) for y in (q, k)]
    numerics.assert_close(kernel(Rebased(1, 6, rngs=nnx.Rngs(0))), np.mean(centred[0] * centred[1], axis=-1) ** 2, 1e-6)


def test_elu_keeps_what_is_small():
    x = np.array([-30.0, -10.0, -1e-3, 0.0, 2.0])
    found = np.asarray(_elu(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(found, [np.exp(-30), np.exp(-10), np.exp(-1e-3), 1, 3], rtol=1e-6)
    assert jax.vmap(jax.grad(_elu))(jnp.array([-200.0, 0.5, 200.0])).tolist() == [0, 1, 1]


@pytest.mark.parametrize("feature_map", [name for name in MAPS if name != "identity"])
def test_what_all_tokens_agree_on_is_kept(feature_map):
    """The weights sum to 1: equal values come out unchanged, whatever the queries and keys."""
    graph, parameters = small.module(lambda rngs: LinearAttention(small.config(feature_map=feature_map), rngs=rngs))
    parameters["value"]["kernel"][1:] = 0
    parameters["out"]["kernel"] = np.eye(16)
    x = numerics.normal(np.random.default_rng(1), 2, 12, 16)
    x[..., 0] = 1
    mixer = nnx.merge(graph, numerics.cast(parameters, "float32"))
    y = numerics.jit(mixer)(numerics.cast(x, "float32"))[0][:, 6:]  # after a few tokens, some have weight in every map
    numerics.assert_close(y, np.broadcast_to(parameters["value"]["kernel"][0], y.shape), 1e-3)


@pytest.mark.parametrize("sharper", [1, 3, 20])
def test_a_token_alone_is_its_value_however_peaked_the_maps(sharper):
    """Hedgehog's features are softmaxes: if a query's and its key's peak in different places, numerator and denominator are
    close to 0, but the quotient is not. Its gradients are finite then, too."""
    graph, parameters = small.module(lambda rngs: LinearAttention(small.config(feature_map="hedgehog"), rngs=rngs))
    parameters["out"]["kernel"] = np.eye(16)
    for name in ("query", "key"):
        parameters[name]["kernel"] = 2 * sharper * parameters[name]["kernel"]
    x = numerics.normal(np.random.default_rng(4), 64, 1, 16)
    run = numerics.with_gradients(lambda parameters, x: nnx.merge(graph, parameters)(x)[0])
    y, gradients = numerics.run(run, (parameters, x), np.ones(x.shape), dtype="float32")
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    if sharper < 20:  # at 20, some are below what float32 can square
        numerics.assert_close(y, x @ parameters["value"]["kernel"], 1e-5)


def test_nothing_that_fits_is_nothing():
    """A query that meets no key under relu gives 0, and finite gradients."""
    graph, parameters = small.module(lambda rngs: LinearAttention(small.config(feature_map="relu"), rngs=rngs))
    parameters["query"]["kernel"] = -np.abs(parameters["query"]["kernel"])
    x = np.abs(numerics.normal(np.random.default_rng(2), 1, 5, 16))
    run = numerics.with_gradients(lambda parameters, x: nnx.merge(graph, parameters)(x)[0])
    y, gradients = numerics.run(run, (parameters, x), np.ones(x.shape), dtype="float32")
    assert not y.any() and all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("dtype", "scale", "documents", "tokens"), [("bfloat16", 1, 4000, 2), ("float32", 8, 40_000, 1)]
)
def test_rebased_is_not_divided_by_rounding(dtype, scale, documents, tokens):
    """In thousands of documents of one or two tokens, some with almost no weight, and however large the scales have become,
    the output is an average of the values, and no larger than they are."""
    config = small.config(dtype=dtype, feature_map="rebased")
    mixer = LinearAttention(config, rngs=nnx.Rngs(0))
    mixer.out.kernel[...] = jnp.eye(16)
    for features in (mixer.query_map, mixer.key_map):
        features.scale[...] = scale * features.scale[...]
    x = jax.random.normal(jax.random.key(1), (documents, tokens, 16), dtype)
    y, _ = jax.jit(mixer)(x)
    assert float(jnp.abs(y).max()) <= float(jnp.abs(mixer.value(x)).max()) * 1.01
