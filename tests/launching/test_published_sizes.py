"""Training steps at published sizes, compiled for a TPU pod and for eight GPUs: they fit, and contain their kernels."""

import importlib.util
import re
from pathlib import Path

import jax
import pytest

from jaxlinear.costs import programs, targets
from jaxlinear.training import ahead_of_time

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

_PATH = Path(__file__).parents[2] / "configs" / "griffin_100m.py"
_SPEC = importlib.util.spec_from_file_location("griffin_100m", _PATH)
griffin_100m = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(griffin_100m)

TARGETS = {"v5p:4x4x4": {"data": 4, "fsdp": 16}, "h100:8": {"data": 1, "fsdp": 8}}
# Prefixes of the kernels' names.
MODELS = {
    "griffin_7b": {
        "v5p:4x4x4": {
            *("rg_lru_forward_packed", "rg_lru_gradient_packed", "splash_fwd", "splash_dq", "splash_dkv"),
            *("short_convolution_forward", "short_convolution_gradient"),
        },
        "h100:8": {
            *("rg_lru_forward_packed", "rg_lru_gradient_packed"),
            *("attention_outputs", "attention_queries", "attention_keys"),
        },
    },
    "gla_1b3": {
        target: {
            *("linear_attention_forward_channel_packed", "linear_attention_gradient_channel_packed"),
            *("gated_rms_norm_forward", "gated_rms_norm_gradient"),
        }
        for target in TARGETS
    },
    "gated_delta_net_1b3": {
        target: {
            *("delta_rule_forward_scalar_packed", "delta_rule_gradient_scalar_packed"),
            *("short_convolution_forward_heads", "short_convolution_gradient_heads"),
        }
        for target in TARGETS
    },
}


@pytest.fixture(autouse=True, scope="module")
def least_effort():
    """With XLA's least effort GLA's step on a pod took half of the time to compile. Kernels take as long as ever."""
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)


def kernels(text):
    """The kernels' names, without what the compiler adds before and after them."""
    operations = "rg_lru|scan|linear_attention|delta_rule|short_convolution|gated_rms_norm"
    found = set(re.findall(rf"(?:{operations})_(?:forward|gradient)(?:_[a-z]+)*", text))
    found |= set(re.findall(r"attention_(?:outputs|queries|keys)", text))
    return found | {"splash_" + kind for kind in re.findall(r"splash\w*?_(fwd|dq|dkv)", text)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("preset", MODELS)
def test_the_step_compiles_with_its_kernels_and_fits(preset, target):
    config, devices = griffin_100m.get_config(), targets.find(target)
    config.model.preset, config.model.vocab_size, config.model.remat = preset, 32_000, "full"
    config.training.batch_size = len(devices.devices)
    config.mesh.update(TARGETS[target])
    made = ahead_of_time.trace(config, devices.devices)
    compiled = made.compile()
    assert programs.read(compiled, made.mesh).memory.total < 0.75 * devices.memory_bytes
    found = kernels(compiled.as_text())
    wanted = MODELS[preset][target]
    assert {name for name in wanted if any(kernel.startswith(name) for kernel in found)} == wanted
