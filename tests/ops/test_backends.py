"""The platform that operations are traced for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.parallel import sharding


def test_operations_are_traced_for_the_platform_in_use():
    """The recurrence is a loop over time on CPU and a parallel prefix elsewhere, one process tracing for both."""
    x = jnp.ones((1, 64, 2), jnp.float32)

    def loops(platform):
        with backends.use_platform(platform):
            jaxpr = jax.make_jaxpr(lambda a, x: ops.linear_recurrence(a, x)[0])(x, x)
        return any(name in str(jaxpr) for name in ("while[", "scan["))

    assert [loops(platform) for platform in ("cpu", "tpu", "gpu", "cpu")] == [True, False, False, True]
    assert backends.platform() == "cpu"


def test_a_mesh_brings_its_platform():
    class Elsewhere:
        platform = "tpu"

    mesh = type("Mesh", (), {"devices": np.array([Elsewhere()]), "shape": {"data": 1}})()
    with sharding.use_mesh(mesh):
        assert backends.platform() == "tpu"
    assert backends.platform() == "cpu"


def test_unknown_backends_are_refused():
    with pytest.raises(UserError, match=r"an_op has no backend 'fast'; it has 'auto', 'chunked'"):
        backends.check("an_op", "fast", ("chunked",))
