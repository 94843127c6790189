"""One layer of each mixer learns from real text: sources of Python's standard library, byte by byte."""

import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxlinear.models import mixers
from jaxlinear.models.parameters import describe
from tests import numerics, small

STEPS, BATCH, LENGTH = 200, 16, 32

CHANGES = {"hgrn2": 16, "mamba2": 16}  # K and V, which are wider than this model by default


def text():
    """Three modules that every Python has, as bytes; the last is held out."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    parts = [(library / name).read_bytes() for name in ("argparse.py", "inspect.py", "optparse.py")]
    return tuple(np.frombuffer(part, np.uint8).astype(np.int32) for part in (parts[0] + parts[1], parts[2]))


def rows(tokens, count, seed):
    starts = np.random.default_rng(seed).integers(0, len(tokens) - LENGTH - 1, count)
    return jnp.asarray(tokens[starts[:, None] + np.arange(LENGTH + 1)])


def entropy_of_a_byte(heldout, tokens):
    """Nats per byte of the held-out text for a model that knows only the byte frequencies of the other text."""
    counts = np.bincount(tokens, minlength=256) + 1
    return -np.mean(np.log(counts / counts.sum())[heldout])


@pytest.mark.slow(but=["delta_net", "gla", "mamba", "rg_lru", "s5"])
@pytest.mark.parametrize("name", mixers.names())
def test_one_layer_learns(name):
    """From the 5.5 nats per byte of knowing nothing to below the 3.1 of byte frequencies without the past."""
    config = small.config(
        pattern=(name,),
        num_layers=1,
        vocab_size=256,
        width=32,
        recurrent_width=32,
        window=8,
        context=LENGTH,
        key_width=CHANGES.get(name, 0),
        value_width=CHANGES.get(name, 0),
        channel_mixer="none",
        logit_soft_cap=0.0,
        embedding_scale=False,
    )
    architecture = describe(config)
    optimizer = optax.adam(optax.linear_schedule(1e-2, 1e-3, STEPS))
    train, heldout = text()

    def loss(parameters, batch):
        logits, _ = architecture.bind(parameters)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @numerics.jit
    def learn(parameters, batches, heldout):
        def step(carry, batch):
            parameters, state = carry
            updates, state = optimizer.update(jax.grad(loss)(parameters, batch), state, parameters)
            return (optax.apply_updates(parameters, updates), state), None

        with jax.numpy_dtype_promotion("standard"):
            (learned, _), _ = lax.scan(step, (parameters, optimizer.init(parameters)), batches)
        return loss(parameters, heldout), loss(learned, heldout)

    batches = rows(train, STEPS * BATCH, 0).reshape(STEPS, BATCH, -1)
    before, after = learn(architecture.initialise(jax.random.key(0)), batches, rows(heldout, 16, 1))
    assert before > 5.4
    assert after < entropy_of_a_byte(heldout, train) - 0.1
