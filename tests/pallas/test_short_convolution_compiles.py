"""The kernel of the short convolution, compiled for absent TPUs, forward and backward.

There is one kernel each way, and no array as long as the sequence is written in another layout around them.
"""

import functools

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.ops import backends, short_convolution
from jaxlinear.parallel import targets
from tests import compiled_text

pytestmark = pytest.mark.compiles_ahead

# name: B, T, D, heads, dtype
CASES = {
    "delta_net_1b3": (2, 2048, 2048, 16, "bfloat16"),
    "gated_delta_net_1b3": (2, 2048, 1800, 9, "bfloat16"),
    "its_values": (2, 2048, 3600, None, "bfloat16"),
    "longest": (1, 131_072, 4096, None, "bfloat16"),
    "float32": (1, 1024, 8192, 32, "float32"),
    "narrow_heads": (1, 1024, 1024, 64, "bfloat16"),
    "small": (3, 1000, 300, 20, "float32"),
    "largest_block": (1, 1024, 8136, 9, "bfloat16"),
}
TPUS = {"v5e:1x1": list(CASES), "v5p:2x2x1": ["gated_delta_net_1b3"], "v6e:1x1": ["delta_net_1b3"]}


@pytest.mark.some_cases("v5e:1x1-longest", "v5e:1x1-small", "v5p:2x2x1-gated_delta_net_1b3", "v6e:1x1-delta_net_1b3")
@pytest.mark.parametrize("target, name", [(target, name) for target, names in TPUS.items() for name in names])
def test_tpu(target, name):
    batch, length, channels, heads, dtype = CASES[name]
    device = targets.find(target).devices[0]

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def both(ids, cotangents, *inputs):
        op = functools.partial(short_convolution, segment_ids=ids, heads=heads)
        outputs, pullback = jax.vjp(op, *inputs)
        return outputs, pullback(cotangents)

    x, state = array(batch, length, channels), array(batch, 3, channels)
    weights = array(4, channels, dtype="float32"), array(channels, dtype="float32")
    with backends.use_device(device):
        program = jax.jit(both).lower(array(batch, length, dtype="int32"), (x, state), x, *weights, state)
        text = program.compile().as_text()
    each_way = [f"short_convolution_{kind}{'_heads' if heads else ''}" for kind in ("forward", "gradient")]
    assert compiled_text.kernels(text, "short_convolution") == each_way
    if channels % 128 == 0 and length % 128 == 0:
        assert not compiled_text.rearrangements(text, batch * length * channels)
