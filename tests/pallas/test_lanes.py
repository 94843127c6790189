"""Channels of heads in registers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear.pallas.parts import lanes

# channels, heads: lanes of each head
SIZES = {(64, 4): 128, (16, 8): 128, (32, 12): 128, (32, 2): 64, (64, 1): 64, (64, 3): 64, (48, 8): 48, (256, 2): 256}


@pytest.mark.parametrize("size", SIZES)
def test_heads_are_read_and_written_apart(size):
    """Of the others in a register nothing is read, and nothing is overwritten."""
    channels, heads = size
    x = np.random.default_rng(channels).normal(size=(3, channels * heads)).astype(np.float32)
    written = jnp.full(x.shape, jnp.nan)
    for h in range(heads):
        place, own = lanes.head_lanes(h, channels, heads), slice(h * channels, (h + 1) * channels)
        alone = np.zeros_like(x)
        alone[:, own] = x[:, own]
        found = place.only(jnp.asarray(x[:, place.register]))
        assert found.shape == (3, SIZES[size])
        np.testing.assert_array_equal(found, alone[:, place.register])
        others = written[:, place.register] if place.first else None
        written = written.at[:, place.register].set(place.only(found, others))
        np.testing.assert_array_equal(written[:, : own.stop], x[:, : own.stop])


@pytest.mark.parametrize("keys, values", [(64, 64), (16, 64), (128, 32), (48, 64)])
def test_states_are_where_products_put_them(keys, values):
    random, heads = np.random.default_rng(0), 8
    k, v = (random.normal(size=(5, width * heads)).astype(np.float32) for width in (keys, values))
    for h in range(heads):
        of_keys, of_values = (lanes.head_lanes(h, width, heads) for width in (keys, values))
        state = v[:, h * values : (h + 1) * values].T @ k[:, h * keys : (h + 1) * keys]
        product = of_values.only(v[:, of_values.register]).T @ of_keys.only(k[:, of_keys.register])
        np.testing.assert_allclose(
            lanes.broadcast(jnp.asarray(state), of_values, of_keys), product, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(lanes.taken(product, of_values, of_keys), state, rtol=1e-5, atol=1e-6)
