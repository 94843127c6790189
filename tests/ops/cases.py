"""What the tests of several operations share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests import naive, numerics, oracles


def expected(random, operation, inputs, ids, **options):
    """Inputs, cotangents, ids and, from the oracles, outputs and gradients."""
    outputs = getattr(oracles, operation)(*inputs, ids=ids, **options)
    cotangents = numerics.cotangents_like(random, outputs)
    reference = numerics.with_gradients(functools.partial(getattr(naive, operation), ids=ids, **options))
    naive_outputs, gradients = numerics.run(reference, inputs, cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return inputs, cotangents, ids, outputs, numerics.wide(gradients)


@functools.cache
def reference(operation, packed):
    """The oracle with its gradients; ``packed`` makes each of 100 tokens a document."""
    ids = np.arange(100)[None] if packed else None
    return numerics.with_gradients(functools.partial(getattr(naive, operation), ids=ids))


def draw_decay(random, kind, batch, length, heads, width):
    """Decays from almost 1 to 1e-9: no entry of ``log_decay`` is rounded to zero in bfloat16."""
    shapes = {"constant": (heads,), "scalar": (batch, length, heads), "channel": (batch, length, heads, width)}
    return None if kind == "none" else numerics.representable(-np.exp(random.uniform(-7, 3, shapes[kind])))


def at_the_limits(kind, log_decay, length, heads, width):
    """A generator, and q, k, v, log decays ``log_decay(random, shape)`` exact in float32, and a state."""
    random, shape = np.random.default_rng(4), (1, length, heads, width)
    q, k, v, state = (numerics.normal(random, *each) for each in (shape, shape, shape, (1, heads, width, width)))
    if kind != "none":
        drawn = log_decay(random, {"constant": (heads,), "scalar": shape[:3], "channel": shape}[kind])
        log_decay = np.asarray(drawn).astype(np.float32).astype(np.float64)
    return random, q, k, v, None if kind == "none" else log_decay, state


def documents(random, batch, length, chance=0.08):
    """Ids that are 0 and 1 in turn."""
    return np.cumsum(random.random((batch, length)) < chance, axis=1, dtype=np.int32) % 2


def attention(batch, length, heads, groups, key_width, value_width, window, past, packed, *, chance, seed):
    random = np.random.default_rng(seed)
    shapes = (length, heads, key_width), (past + length, groups, key_width), (past + length, groups, value_width)
    inputs = tuple(numerics.normal(random, batch, *shape) for shape in shapes)
    ids = documents(random, batch, past + length, chance)
    return expected(random, "sliding_window_attention", inputs, ids if packed else None, window=window)


def temporaries(operation, *shapes):
    """The bytes of temporary arrays in the gradient of a sum of squared outputs."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.grad(lambda *inputs: jnp.sum(operation(*inputs)[0] ** 2), tuple(range(len(inputs))))
    return numerics.jit(gradient).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
