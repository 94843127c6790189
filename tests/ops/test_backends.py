"""The platform that operations are traced for."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.ops import backends
from jaxlinear.pallas.attention import blocks as attention_blocks
from jaxlinear.pallas.delta_rule import blocks as delta_rule_blocks
from jaxlinear.pallas.parts.target import Target, gpu_of
from jaxlinear.parallel import sharding


def test_operations_are_traced_for_the_platform_in_use():
    """The recurrence is a loop over time on CPU and a kernel on TPU and GPU; one process traces for all three."""
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
        assert backends.target() == Target("tpu", "TPU v5 lite", False)
    assert backends.platform() == "cpu"


@pytest.mark.parametrize(
    "capability, kind, reason",
    [
        ("9.0", "NVIDIA H100 80GB HBM3", None),
        ("8.9", "NVIDIA L40S", None),
        ("13.0", "NVIDIA's next", None),
        ("7.0", "Tesla V100", "need compute capability 8.0 (A100) or higher, not 7.0 (Tesla V100)"),
        ("gfx942", "AMD Instinct MI300X", "run on NVIDIA GPUs only, not on AMD Instinct MI300X"),
        (
            None,
            "Intel(R) Data Center GPU Max 1550",
            "run on NVIDIA GPUs only, not on Intel(R) Data Center GPU Max 1550",
        ),
    ],
)
def test_gpus_that_kernels_are_built_for(capability, kind, reason):
    given = {} if capability is None else {"compute_capability": capability}
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, **given)
    with backends.use_device(device):
        assert backends.no_kernels() == (reason and f"the kernels for GPU {reason}")


@pytest.mark.parametrize(
    "capability, kilobytes, attention, chunk",
    [
        ("8.0", 163, (64, 64, 8, 2), 32),
        ("9.0", 227, (128, 64, 8, 2), 64),
        ("10.0", 227, (64, 64, 4, 2), 64),
        ("8.6", 99, (64, 32, 4, 2), 32),
        ("12.0", 99, (64, 32, 4, 2), 32),
        ("13.0", 227, (64, 32, 4, 2), 32),  # never tried with a compiler
        ("8.9", None, (64, 32, 4, 2), 32),  # a JAX that does not report it
        ("9.0", None, (128, 64, 8, 2), 64),
    ],
)
def test_blocks_fit_the_shared_memory(capability, kilobytes, attention, chunk):
    """Attention's blocks at K = 128, and the delta rule's chunk at K = 256."""
    memory = {} if kilobytes is None else {"shared_memory_per_block_optin": kilobytes * 1024}
    device = types.SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=capability, **memory)
    with backends.use_device(device):
        gpu = backends.target().gpu
        assert gpu == gpu_of(device)
        assert attention_blocks.gpu(128, gpu) == attention
        assert delta_rule_blocks.gpu(4096, 256, False, None, gpu, 1).chunk == chunk
        x = jnp.ones((1, 64, 2, 256), jnp.bfloat16)
        if not gpu.ample:
            with pytest.raises(UserError, match="takes chunks of a power of two from 16 to 32 tokens, not of 64"):
                ops.delta_rule(x, x, x, jnp.ones((1, 64, 2)), chunk_size=64, backend="pallas")


@pytest.mark.parametrize("shape", [(0, 256, 2, 64), (2, 256, 0, 64)], ids=["no_rows", "no_heads"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_empty_arrays_take_no_kernel(platform, shape):
    """The grid would be empty, and Pallas divides by its size."""
    x, gate = jnp.ones(shape, jnp.bfloat16), jnp.ones(shape[:3], jnp.float32)
    recurrences = {ops.linear_recurrence: (x, x), ops.linear_attention: (x, x, x), ops.delta_rule: (x, x, x, gate)}
    window = functools.partial(ops.sliding_window_attention, window=100)
    for operation, arrays in (recurrences | dict.fromkeys((ops.causal_attention, window), (x, x, x))).items():

        def both(*given, operation=operation):
            outputs, pullback = jax.vjp(operation, *given)
            return outputs, pullback(outputs)

        with backends.use_platform(platform):
            jaxpr = jax.make_jaxpr(both)(*arrays)
            if operation in recurrences:
                with pytest.raises(
                    UserError, match=re.escape(f"takes no empty arrays, such as this one of shape {list(shape)}")
                ):
                    operation(*arrays, backend="pallas")
        assert "pallas_call[" not in str(jaxpr)
        assert jaxpr.out_avals[0].shape == shape and [y.shape for y in jaxpr.out_avals[-len(arrays) :]] == [
            y.shape for y in arrays
        ]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_kernels_are_not_compiled_for_indices_of_64_bits(platform):
    """The compilers would fail with obscure errors."""
    x, heads = jnp.ones((1, 64, 2)), jnp.ones((1, 64, 1, 16), jnp.bfloat16)
    calls = {
        "linear_recurrence": functools.partial(ops.linear_recurrence, x, x),
        "linear_attention": functools.partial(ops.linear_attention, heads, heads, heads),
        "causal_attention": functools.partial(ops.causal_attention, heads, heads, heads),
    }

    def is_a_kernel(call, **options):
        return "pallas_call[" in str(jax.make_jaxpr(lambda: jax.tree.leaves(call(**options))[0])())

    for name, call in calls.items():
        with jax.enable_x64(True), backends.use_platform(platform):
            assert not is_a_kernel(call)
            with pytest.raises(UserError, match=f"^{name}: the kernel is compiled for 32-bit indices, and jax_enable"):
                call(backend="pallas")
        with backends.use_platform(platform):
            assert is_a_kernel(call, backend="pallas")
