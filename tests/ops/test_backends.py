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
    """The recurrence is a loop over time on CPU and a kernel on TPU and GPU, one process tracing for all."""
    x = jnp.ones((1, 64, 2), jnp.float32)

    def traced_for(platform):
        with backends.use_platform(platform):
            jaxpr = str(jax.make_jaxpr(lambda a, x: ops.linear_recurrence(a, x)[0])(x, x))
        return "kernel" if "pallas_call[" in jaxpr else "loop" if "while[" in jaxpr or "scan[" in jaxpr else "neither"

    assert [traced_for(platform) for platform in ("cpu", "tpu", "gpu", "cpu")] == ["loop", "kernel", "kernel", "loop"]
    assert backends.platform() == "cpu"


def test_a_mesh_brings_its_platform():
    class Elsewhere:
        platform, device_kind = "tpu", "TPU v5 lite"

    mesh = type("Mesh", (), {"devices": np.array([Elsewhere()]), "shape": {"data": 1}})()
    with sharding.use_mesh(mesh):
        assert backends.target() == ("tpu", "TPU v5 lite", False)
    assert backends.platform() == "cpu"


def test_unknown_backends_are_refused():
    with pytest.raises(UserError, match=r"an_op has no backend 'fast'; it has 'auto', 'chunked'"):
        backends.check("an_op", "fast", ("chunked",))
