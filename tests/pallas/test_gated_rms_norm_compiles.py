"""The kernels of the RMSNorm with its gate, compiled for absent TPUs and GPUs, forward and backward.

There is one kernel each way, and no array as long as the sequence is written in another layout around them. On GPU, ptxas
reports each kernel's registers: none is spilled.
"""

import functools

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import backends, gated_rms_norm
from tests import compiled_text, gpus, ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

# name: B, T, D, heads, whether there is a skip, whether the norm comes first, the dtype, and the activation unless SiLU
CASES = {
    "mamba2_1b3": (2, 2048, 4096, 1, True, False, "bfloat16"),
    "mamba2_2b7": (2, 2048, 5120, 1, True, False, "bfloat16"),
    "gla_1b3": (2, 2048, 2048, 4, False, True, "bfloat16"),
    "float32": (1, 1000, 8192, 1, True, True, "float32"),
    "kda": (2, 2048, 2048, 16, False, True, "bfloat16", "sigmoid"),
    "widest": (1, 1024, 16_384, 1, True, False, "bfloat16"),
    "short": (3, 9, 2048, 4, False, True, "bfloat16"),  # a block is longer than the sequence
    "longest": (1, 131_072, 2048, 8, False, True, "bfloat16"),
}
ON_GPU = {name: CASES[name] for name in ("mamba2_1b3", "mamba2_2b7", "gla_1b3", "kda", "longest")} | {
    "float32": (1, 1000, 5120, 1, True, True, "float32"),
    "gated_delta_net_1b3": (2, 2048, 3600, 9, False, True, "bfloat16"),
    "narrow_heads": (3, 1000, 1920, 30, False, True, "bfloat16"),
    "over_4_gib": (8, 131_072, 4096, 8, False, True, "bfloat16"),  # offsets have 64 bits
}
TPUS = {"v5e:1x1": list(CASES), "v5p:2x2x1": ["mamba2_1b3"], "v6e:1x1": ["gla_1b3"]}
EACH_WAY = ["gated_rms_norm_forward", "gated_rms_norm_gradient"]


@pytest.mark.slow(but=["v5e:1x1-mamba2_2b7", "v5e:1x1-widest", "v5p:2x2x1-mamba2_1b3", "v6e:1x1-gla_1b3"])
@pytest.mark.parametrize("target, name", [(target, name) for target, names in TPUS.items() for name in names])
def test_tpu(target, name):
    text = compiled(targets.find(target).devices[0], CASES[name]).as_text()
    batch, length, channels = CASES[name][:3]
    assert compiled_text.kernels(text, "gated_rms_norm") == EACH_WAY
    if length % 128 == 0:
        assert not compiled_text.rearrangements(text, batch * length * channels)


@pytest.mark.parametrize("name", ON_GPU)
def test_h100(name, tmp_path, record_property):
    options = {"compiler_options": ptxas.dumped_to(tmp_path)}
    text = compiled(targets.find("h100:1").devices[0], ON_GPU[name], **options).as_text()
    batch, length, channels = ON_GPU[name][:3]
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert not compiled_text.rearrangements(text, batch * length * channels)
    used = ptxas.registers(tmp_path, "gated_rms_norm")
    record_property("registers", used)
    assert sorted(used) == EACH_WAY


@pytest.mark.parametrize("gpu", ["a100", "l40"])
def test_other_gpus(gpu, tmp_path):
    compiled(gpus.device(gpu), CASES["mamba2_2b7"], compiler_options=ptxas.dumped_to(tmp_path))
    assert sorted(ptxas.registers(tmp_path, "gated_rms_norm")) == EACH_WAY


def compiled(device, case, **options):
    """Both passes, and the gradients of all arguments."""
    batch, length, channels, heads, skips, before, dtype, *activation = case

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def both(cotangent, *inputs):
        options = {"norm_before_gate": before} | ({"activation": activation[0]} if activation else {})
        op = functools.partial(gated_rms_norm, epsilon=1e-6, **options)
        y, pullback = jax.vjp(op, *inputs)
        return y, pullback(cotangent)

    x = array(batch, length, channels)
    inputs = x, x, array(channels // heads, dtype="float32")
    if skips:
        inputs += x, array(channels, dtype="float32")
    with backends.use_device(device):
        return jax.jit(both).lower(x, *inputs).compile(**options)
