"""The kernel of the RG-LRU, gates and recurrence in one, compiled for absent TPUs, forward and backward.

There is one kernel each way, and no array as long as the sequence is written in another layout around them.
"""

import functools

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.ops import SAVED, backends, rg_lru
from jaxlinear.parallel import targets
from tests import compiled_text

pytestmark = pytest.mark.compiles_ahead

kernels = functools.partial(compiled_text.kernels, name="rg_lru")

# name: B, T, R, N, dtype, packed
CASES = {
    "griffin_1b3": (2, 2048, 2560, 16, "bfloat16", True),
    "griffin_7b": (1, 4096, 5632, 32, "bfloat16", False),
    "recurrentgemma_9b": (1, 4096, 4096, 16, "bfloat16", True),
    "float32": (1, 1024, 5632, 32, "float32", True),
    "longest": (1, 131_072, 4096, 16, "bfloat16", False),
    "half_a_register": (1, 1024, 704, 4, "bfloat16", True),  # Griffin 7B's over 8 devices
    "small": (3, 1000, 300, 20, "float32", True),
    "largest_block": (1, 4096, 1152, 1, "bfloat16", True),
}
TPUS = {
    "v5e:1x1": list(CASES),
    "v5p:2x2x1": ["recurrentgemma_9b"],
    "v6e:1x1": ["griffin_1b3"],
    "tpu7x:2x2x1": ["recurrentgemma_9b"],
}


def compiled(target, name, remat=False):
    batch, length, width, count, dtype, packed = CASES[name]
    device = targets.find(target).devices[0]

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    x, h, state = array(batch, length, width, dtype=dtype), array(batch, length, width), array(batch, width)
    kernel, vector = array(count, width // count, width // count), array(width)
    ids = array(batch, length, dtype="int32") if packed else None

    def both(first, ids, cotangents, *inputs):
        def operation(*inputs):
            *of_gates, state = inputs
            return rg_lru(*of_gates, first, state, segment_ids=ids)

        if remat:
            operation = jax.checkpoint(operation, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))
        outputs, pullback = jax.vjp(operation, *inputs)
        return outputs, pullback(cotangents)

    with backends.use_device(device):
        inputs = x, kernel, vector, kernel, vector, vector, state
        return jax.jit(both).lower(array(batch, length, dtype=bool), ids, (h, state), *inputs).compile().as_text()


def names(packed):
    return [f"rg_lru_{kind}{'_packed' if packed else ''}" for kind in ("forward", "gradient")]


@pytest.mark.some_cases(
    without=[f"v5e:1x1-{name}" for name in ("griffin_1b3", "float32", "half_a_register", "largest_block")]
)
@pytest.mark.parametrize("target, name", [(target, name) for target, names in TPUS.items() for name in names])
def test_tpu(target, name):
    batch, length, width, _, _, packed = CASES[name]
    text = compiled(target, name)
    assert kernels(text) == names(packed)
    if width % 128 == 0 and length % 128 == 0:
        assert not compiled_text.rearrangements(text, batch * length * width)


def test_remat_runs_the_forward_kernel_once():
    assert kernels(compiled("v5e:1x1", "recurrentgemma_9b", remat=True)) == names(True)
