"""Based's gated convolution: its how far it sees."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlinear.models.mixers.convolution import Convolution
from tests import small


def test_it_sees_as_many_tokens_as_its_width():
    mixer = Convolution(small.config(convolution_width=3), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 16)), jnp.float32)
    run = jax.jit(lambda x: mixer(x)[0])
    changed = jnp.any(run(x) != run(x.at[:, 4].add(1.0)), axis=-1)[0]
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False] * 2
