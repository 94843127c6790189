"""The kernels of the short convolution, compiled for absent TPUs and GPUs, forward and backward.

There is one kernel each way, and no array as long as the sequence is written in another layout around them. On GPU, ptxas
reports each kernel's registers: none is spilled.
"""

import functools

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import backends, short_convolution
from tests import compiled_text, gpus, ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

# name: B, T, D, heads, dtype and, unless there are 4, taps and, unless it is SiLU, activation
CASES = {
    "delta_net_1b3": (2, 2048, 2048, 16, "bfloat16"),
    "gated_delta_net_1b3": (2, 2048, 1800, 9, "bfloat16"),
    "its_values": (2, 2048, 3600, None, "bfloat16"),
    "griffin_1b3": (2, 2048, 2560, None, "bfloat16", 4, "none"),
    "longest": (1, 131_072, 4096, None, "bfloat16"),
    "float32": (1, 1024, 8192, 32, "float32"),
    "narrow_heads": (1, 1024, 1024, 64, "bfloat16"),
    "small": (3, 1000, 300, 20, "float32"),
    "largest_block": (1, 1024, 8136, 9, "bfloat16"),
}
ON_GPU = {
    **{
        name: CASES[name]
        for name in ("delta_net_1b3", "gated_delta_net_1b3", "its_values", "griffin_1b3", "float32", "small")
    },
    "narrow_heads": (1, 1024, 1024, 64, "bfloat16"),
    "widest_heads": (1, 1024, 1536, 6, "float32"),
    "most_taps": (1, 1024, 1024, 8, "float32", 9),
    "over_4_gib": (8, 131_072, 4096, 32, "bfloat16"),  # offsets have 64 bits
}
TPUS = {
    "v5e:1x1": list(CASES),
    "v5p:2x2x1": ["gated_delta_net_1b3", "griffin_1b3"],
    "v6e:1x1": ["delta_net_1b3", "griffin_1b3"],
}


@pytest.mark.slow(
    but=[
        *(
            "v5e:1x1-longest",
            "v5e:1x1-small",
            "v5e:1x1-griffin_1b3",
            "v5p:2x2x1-gated_delta_net_1b3",
            "v6e:1x1-delta_net_1b3",
        )
    ]
)
@pytest.mark.parametrize("target, name", [(target, name) for target, names in TPUS.items() for name in names])
def test_tpu(target, name):
    text = compiled(targets.find(target).devices[0], CASES[name]).as_text()
    batch, length, channels, heads = CASES[name][:4]
    assert compiled_text.kernels(text, "short_convolution") == each_way(heads)
    if channels % 128 == 0 and length % 128 == 0:
        assert not compiled_text.rearrangements(text, batch * length * channels)


@pytest.mark.parametrize("name", ON_GPU)
def test_h100(name, tmp_path, record_property):
    options = {"compiler_options": ptxas.dumped_to(tmp_path)}
    text = compiled(targets.find("h100:1").devices[0], ON_GPU[name], **options).as_text()
    batch, length, channels, heads = ON_GPU[name][:4]
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert not compiled_text.rearrangements(text, batch * length * channels)
    used = ptxas.registers(tmp_path, "short_convolution")
    record_property("registers", used)
    assert sorted(used) == each_way(heads)


@pytest.mark.parametrize("gpu", ["a100", "l40"])
def test_other_gpus(gpu, tmp_path):
    compiled(gpus.device(gpu), ON_GPU["widest_heads"], compiler_options=ptxas.dumped_to(tmp_path))
    assert sorted(ptxas.registers(tmp_path, "short_convolution")) == each_way(6)


def each_way(heads):
    return [f"short_convolution_{kind}{'_heads' if heads else ''}" for kind in ("forward", "gradient")]


def compiled(device, case, **options):
    """Both passes, and the gradients of all arguments."""
    batch, length, channels, heads, dtype, width, activation = *case, *(4, "silu")[len(case) - 5 :]

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def both(ids, cotangents, *inputs):
        options = {"segment_ids": ids, "head_width": heads and channels // heads, "activation": activation}
        op = functools.partial(short_convolution, **options)
        outputs, pullback = jax.vjp(op, *inputs)
        return outputs, pullback(cotangents)

    x, state = array(batch, length, channels), array(batch, width - 1, channels)
    weights = array(width, channels, dtype="float32"), array(channels, dtype="float32")
    with backends.use_device(device):
        program = jax.jit(both).lower(array(batch, length, dtype="int32"), (x, state), x, *weights, state)
        return program.compile(**options)
