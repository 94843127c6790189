"""What the tests of several operations share."""

import functools

import jax
import jax.numpy as jnp

from tests import naive, numerics, oracles


def expected(random, operation, inputs, ids, **options):
    """Inputs, cotangents, ids and, from the oracles, outputs and gradients."""
    outputs = getattr(oracles, operation)(*inputs, ids=ids, **options)
    cotangents = numerics.cotangents_like(random, outputs)
    reference = numerics.with_gradients(functools.partial(getattr(naive, operation), ids=ids, **options))
    naive_outputs, gradients = numerics.run(reference, inputs, cotangents, dtype="float64")
    numerics.assert_close(naive_outputs, outputs, 1e-12)
    return inputs, cotangents, ids, outputs, numerics.wide(gradients)


def temporaries(operation, *shapes):
    """The bytes of temporary arrays in the gradient of a sum of squared outputs."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.grad(lambda *inputs: jnp.sum(operation(*inputs)[0] ** 2), tuple(range(len(inputs))))
    return numerics.jit(gradient).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
