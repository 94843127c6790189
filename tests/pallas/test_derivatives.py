"""Derivatives of the kernels' gradients are refused; the backend that the message names supports them."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.pallas.parts.target import Target

X = jnp.ones((1, 32, 1, 16))
OPERATIONS = {
    "linear_recurrence": (lambda x, **how: ops.linear_recurrence(x, x, **how)[0], "associative"),
    "linear_attention": (lambda x, **how: ops.linear_attention(x, x, x, **how)[0], "chunked"),
    "delta_rule": (lambda x, **how: ops.delta_rule(x, x, x, x[..., 0], **how)[0], "chunked"),
    "causal_attention": (lambda x, **how: ops.causal_attention(x, x, x, **how), "chunked"),
    "sliding_window_attention": (lambda x, **how: ops.sliding_window_attention(x, x, x, window=8, **how), "chunked"),
}


def of_gradient(operation):
    return jax.grad(lambda x: jnp.sum(operation(x) ** 2))


def reverse(operation):
    return jax.grad(lambda x: jnp.sum(of_gradient(operation)(x)))


def forward(operation):
    return lambda x: jax.jvp(of_gradient(operation), (x,), (x,))


def of_cotangents(operation):
    """The derivative of the gradient with respect to the output's cotangents, at fixed inputs."""

    def gradient(operation, cotangents):
        _, pullback = jax.vjp(operation, X)
        return jnp.sum(pullback(cotangents)[0])

    return jax.grad(lambda x: gradient(operation, jnp.broadcast_to(x, operation(X).shape)))


@pytest.mark.parametrize("derivative", [reverse, forward, of_cotangents])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_of_gradients_are_refused(name, platform, derivative, monkeypatch):
    monkeypatch.setattr(backends, "target", lambda: Target(platform, "none", True))
    operation, instead = OPERATIONS[name]
    message = f"the kernel (backend='pallas') has no second derivatives; use backend='{instead}'"
    with pytest.raises(UserError, match=re.escape(message)):
        jax.eval_shape(derivative(functools.partial(operation, backend="pallas")), X)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_backend_that_is_named_has_them(name):
    operation, instead = OPERATIONS[name]
    assert jax.eval_shape(reverse(functools.partial(operation, backend=instead)), X) == jax.eval_shape(lambda x: x, X)


@pytest.mark.parametrize("name", ["linear_recurrence", "linear_attention"])
def test_they_are_differences_of_gradients(name):
    """They are taken along a line."""
    operation, instead = OPERATIONS[name]
    gradient = of_gradient(functools.partial(operation, backend=instead))
    x, direction = (jax.random.normal(key, X.shape) / 4 for key in jax.random.split(jax.random.key(0)))
    along = jax.jit(lambda t: jnp.vdot(gradient(x + t * direction), direction))
    found, differences = jax.jit(jax.grad(along))(0.0), (along(1e-2) - along(-1e-2)) / 2e-2
    assert abs(differences) > 0.01
    assert found == pytest.approx(float(differences), rel=2e-2)
