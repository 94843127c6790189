"""The kernels that ``auto`` chooses, compiled for GPUs other than the H100: Blackwell, whose products take more shared
memory; GPUs with less of it; and one too old for any kernel."""

import logging
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear import log_once
from jaxlinear.errors import UserError
from jaxlinear.ops import (
    backends,
    causal_attention,
    delta_rule,
    linear_attention,
    linear_recurrence,
    sliding_window_attention,
)
from tests import gpus, ptxas

pytestmark = pytest.mark.usefixtures("optimised")

LENGTH, HEADS = 1000, 2


def window(q, k, v, **options):
    return sliding_window_attention(q, k, v, window=256, **options)


# By name: the operation, the prefix of its kernels' names, the number of arrays with channels, and its backend without one.
OPERATIONS = {
    "causal_attention": (causal_attention, "attention_", 3, "chunked"),
    "sliding_window_attention": (window, "attention_", 3, "chunked"),
    "linear_attention": (linear_attention, "linear_attention_", 3, "chunked"),
    "delta_rule": (delta_rule, "delta_rule_", 3, "chunked"),
    "linear_recurrence": (linear_recurrence, "scan_", 2, "associative"),
}


def lowered(name, width, device, gradients=True, **options):
    """The operation lowered for the device, by default with gradients."""
    operation, _, count, _ = OPERATIONS[name]
    place = SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct((1, LENGTH, HEADS, width), jnp.bfloat16, sharding=place)] * count
    if name == "delta_rule":
        arrays.append(jax.ShapeDtypeStruct((1, LENGTH, HEADS), jnp.float32, sharding=place))

    def both(*given):
        outputs, pullback = jax.vjp(lambda *x: operation(*x, **options), *given)
        return outputs, pullback(outputs) if gradients else None

    with backends.use_device(device):
        return jax.jit(both).lower(*arrays)


@pytest.mark.slow
@pytest.mark.slow(but_nth=3)
@pytest.mark.parametrize(
    "gpu, name, width, kernels",
    [
        ("a100", "causal_attention", 64, 3),
        ("a100", "causal_attention", 128, 3),
        ("a100", "causal_attention", 256, 3),
        ("a100", "delta_rule", 128, 6),
        ("a100", "linear_attention", 128, 2),
        ("b200", "sliding_window_attention", 128, 3),
        ("b200", "causal_attention", 256, 3),
        ("l40", "causal_attention", 64, 3),
        ("l40", "causal_attention", 128, 3),
        ("l40", "sliding_window_attention", 256, 3),
        ("b200", "delta_rule", 256, 2),
        ("l40", "delta_rule", 256, 6),
        ("l40", "linear_attention", 128, 2),
        ("b200", "linear_recurrence", 128, 1),
    ],
)
def test_kernels_compile(gpu, name, width, kernels, tmp_path, record_property):
    """They fit the GPU's shared memory and spill no register. One or two kernels are the forward pass alone."""
    program = lowered(name, width, gpus.device(gpu), gradients=kernels > 2)
    text = program.compile(compiler_options=ptxas.dumped_to(tmp_path)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == kernels
    used = ptxas.registers(tmp_path, OPERATIONS[name][1])
    record_property("registers", used)
    assert len(used) == kernels and all(count <= 255 for count in used.values())


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_gpu_without_kernels(name, caplog):
    """``auto`` chooses what XLA compiles and says why, once; ``pallas`` is refused."""
    device, elsewhere = gpus.device("t4"), OPERATIONS[name][3]
    log_once._logged.clear()
    with caplog.at_level(logging.INFO, logger="jaxlinear"):
        program = lowered(name, 64, device)
        lowered(name, 64, device, gradients=False)
    assert "triton" not in program.as_text()
    reason = "the kernels for GPU need compute capability 8.0 (A100) or higher, not 7.5 (Tesla T4)"
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(name) and said.endswith(f", not as a kernel: {reason}")
    refused = re.escape(f"{name}: {reason}; use backend='{elsewhere}'")
    with pytest.raises(UserError, match=refused):
        lowered(name, 64, device, backend="pallas")
    if name == "sliding_window_attention":
        program.compile()
