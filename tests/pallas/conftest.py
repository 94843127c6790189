"""Kernels are tested without implicit promotion of dtypes or ranks, in small blocks, so short sequences have several."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxlinear.ops import backends
from jaxlinear.pallas.attention import blocks as attention
from jaxlinear.pallas.delta_rule import blocks as delta_rule
from jaxlinear.pallas.gated_rms_norm import blocks as gated_rms_norm
from jaxlinear.pallas.linear_attention import blocks as linear_attention
from jaxlinear.pallas.parts.target import Target
from jaxlinear.pallas.rg_lru import blocks as rg_lru
from jaxlinear.pallas.scan import blocks as scan
from jaxlinear.pallas.selective_scan import blocks as selective_scan
from jaxlinear.pallas.short_convolution import blocks as short_convolution

# By name, how kernels run here: interpreted; "simulated" with TPU memories and copies, where reads beyond an array or of
# memory that nothing wrote give NaN; "emulated" from their PTX, with the instructions that are written in it.
TARGETS = {
    "tpu": Target("tpu", "none", True),
    "gpu": Target("gpu", "none", True),
    "simulated": Target("tpu", "none", pltpu.InterpretParams(uninitialized_memory="nan")),
    "emulated": Target("gpu", "none", False),
}


@pytest.fixture(autouse=True, scope="module")
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def use(monkeypatch):
    """``use(name)``: from then on, kernels are for that target."""
    return lambda name: monkeypatch.setattr(backends, "target", lambda: TARGETS[name])


@pytest.fixture
def short_chunks(monkeypatch):
    """16 tokens, as few heads at a time as fill registers: programs are small and compile fast."""
    monkeypatch.setattr(linear_attention, "_TPU_ELSEWHERE", (linear_attention.Block(16, 16, 1),) * 2)
    monkeypatch.setattr(delta_rule, "_TPU_ELSEWHERE", delta_rule.Block(16, 16, 1))


@pytest.fixture
def small_blocks(monkeypatch):
    """128 time steps x 128 channels, 16 steps at a time; on GPU, 8 steps of a and x at a time. In the selective scan, 8
    tokens at a time. In linear attention, two chunks per block, one if decays are by channel."""
    small = {
        scan: {"_TPU_ELSEWHERE": scan.Block(128, 128, 16), "_GPU_REGISTERS": 16},
        selective_scan: {"ROWS": 8, "_NUMBERS": 1024},
        linear_attention: {"_TPU_ELSEWHERE": (linear_attention.Block(64, 32, 1), linear_attention.Block(32, 32, 1))},
        delta_rule: {"_TPU_ELSEWHERE": delta_rule.Block(32, 32, 256)},
        attention: {"tpu": lambda *_: 128, "gpu": lambda *_: attention.GPUBlock(16, 32, 4, 1)},
        rg_lru: {"TIME": (128,), "ROWS": 64, "CHANNELS": 256, "GPU_CHANNELS": 128, "GPU_ROWS": (4, 2), "GPU_TIME": 16},
        gated_rms_norm: {"TPU_TIME": (64, 32), "TPU_NUMBERS": 64 * 1024},
        short_convolution: {"TPU_TIME": (128,), "TPU_CHANNELS": 256, "GPU_TIME": 32},
    }
    for module, changes in small.items():
        for name, value in changes.items():
            monkeypatch.setattr(module, name, value)
