"""The kernel of the RG-LRU's gates, compiled for absent TPUs, forward and backward.

There is one kernel each way, and no array as long as the sequence is written in another layout around them.
"""

import functools

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import backends, rg_lru_gates
from tests import compiled_text

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

kernels = functools.partial(compiled_text.kernels, name="rg_lru_gates")
EACH_WAY = ["rg_lru_gates_forward", "rg_lru_gates_gradient"]

# name: B, T, R, N, dtype
CASES = {
    "griffin_1b3": (2, 2048, 2560, 16, "bfloat16"),
    "recurrentgemma_9b": (1, 4096, 4096, 16, "bfloat16"),
    "float32": (1, 1024, 2560, 16, "float32"),
    "longest": (1, 131_072, 4096, 16, "bfloat16"),
    "half_a_register": (1, 1024, 704, 4, "bfloat16"),  # Griffin 7B's over 8 devices
    "small": (3, 1000, 300, 20, "float32"),
    "largest_block": (1, 4096, 1152, 1, "bfloat16"),
}
TPUS = {
    "v5e:1x1": [name for name in CASES if name != "recurrentgemma_9b"],
    "v5p:2x2x1": ["recurrentgemma_9b"],
    "v6e:1x1": ["recurrentgemma_9b"],
}


@pytest.mark.slow(cases=[f"v5e:1x1-{name}" for name in ("griffin_1b3", "float32", "half_a_register", "largest_block")])
@pytest.mark.parametrize("target, name", [(target, name) for target, names in TPUS.items() for name in names])
def test_tpu(target, name):
    batch, length, width, count, dtype = CASES[name]
    device = targets.find(target).devices[0]

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    x, in_time = array(batch, length, width, dtype=dtype), array(batch, length, width)
    kernel, vector = array(count, width // count, width // count), array(width)

    def both(first, cotangents, *inputs):
        outputs, pullback = jax.vjp(lambda *inputs: rg_lru_gates(*inputs, first), *inputs)
        return outputs, pullback(cotangents)

    with backends.use_device(device):
        inputs = x, kernel, vector, kernel, vector, vector
        program = jax.jit(both).lower(array(batch, length, dtype=bool), (in_time, in_time), *inputs)
        text = program.compile().as_text()
    assert kernels(text) == EACH_WAY
    if width % 128 == 0 and length % 128 == 0:
        assert not compiled_text.rearrangements(text, batch * length * width)
