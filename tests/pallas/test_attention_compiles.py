"""The attention kernels that ``auto`` chooses, compiled for absent TPUs and GPUs, forward and backward.

On GPU, ptxas reports each kernel's registers: none is spilled.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import SAVED, backends, causal_attention, sliding_window_attention
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import operations, sharding
from tests import ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

# name: B, T, H, G, K, window, dtype, packed
CASES = {
    "griffin": (1, 8192, 8, 1, 128, 2048, "bfloat16", True),
    "recurrent_gemma": (2, 4096, 4, 1, 256, 2048, "bfloat16", False),
    "grouped_64": (2, 2048, 8, 4, 64, 512, "float32", True),
    "longest": (1, 131_072, 2, 1, 64, 1024, "bfloat16", True),
    "odd": (1, 1000, 3, 3, 48, 100, "bfloat16", True),
    "all_tokens": (1, 4096, 4, 4, 128, None, "bfloat16", True),
    # Arrays that are not in VMEM as a whole: blocks of them are, and nearly fill it.
    "largest_blocks": (8, 4096, 4, 1, 256, None, "bfloat16", True),
    "largest_in_float32": (8, 4096, 4, 4, 192, None, "float32", True),
    "widest": (8, 4096, 4, 4, 512, None, "bfloat16", True),
    "widest_in_float32": (8, 4096, 4, 4, 512, None, "float32", True),
}
ON_GPU = {
    **{name: case for name, case in CASES.items() if case[6] == "bfloat16" and case[4] <= 256},
    "over_4_gib": (8, 131_072, 24, 8, 128, None, "bfloat16", True),  # offsets have 64 bits
}
TARGETS = {
    "v5e:1x1": list(CASES),
    "v5p:2x2x1": ["griffin"],
    "v6e:1x1": ["griffin", "recurrent_gemma"],
    "tpu7x:2x2x1": ["griffin"],
}
KERNELS = ["dkv", "dq", "fwd"]


def kernels(text):
    return sorted(re.findall(r"%\w*?splash\w*?_(fwd|dq|dkv)\w*[.\d]* = .*custom-call\(", text))


def shape(batch, length, heads, width, dtype, device):
    return jax.ShapeDtypeStruct((batch, length, heads, width), dtype, sharding=SingleDeviceSharding(device))


def compiled(target, name, **options):
    batch, length, heads, groups, width, window, dtype, packed = (CASES | ON_GPU)[name]
    device = targets.find(target).devices[0]
    q, k = (shape(batch, length, n, width, dtype, device) for n in (heads, groups))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=SingleDeviceSharding(device)) if packed else None
    operation = causal_attention if window is None else functools.partial(sliding_window_attention, window=window)

    def both(q, k, v, ids, d_o):
        run = jax.checkpoint(operation, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))
        o, pullback = jax.vjp(lambda *x: run(*x, segment_ids=ids), q, k, v)
        return o, pullback(d_o)

    with backends.use_device(device):
        return jax.jit(both).lower(q, k, k, ids, q).compile(**options)


@pytest.mark.slow(
    cases=("v5e:1x1-largest_in_float32", "v5e:1x1-widest", "v6e:1x1-recurrent_gemma", "tpu7x:2x2x1-griffin")
)
@pytest.mark.parametrize("target, name", [(target, name) for target, cases in TARGETS.items() for name in cases])
def test_tpu(target, name):
    text = compiled(target, name).as_text()
    assert kernels(text) == KERNELS  # the forward one once, since its outputs are saved
    assert " while(" not in text


@pytest.mark.parametrize("name", ON_GPU)
def test_h100(name, tmp_path, record_property):
    text = compiled("h100:1", name, compiler_options=ptxas.dumped_to(tmp_path)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3 and " while(" not in text
    used = ptxas.registers(tmp_path, "attention_")
    record_property("registers", used)
    assert set(used) == {"attention_outputs", "attention_queries", "attention_keys"}
    assert all(32 < count <= 255 for count in used.values())


@pytest.mark.parametrize("target", ["v5e:2x4", "h100:8"])
@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"sequence": 4, "tensor": 2}], ids=str)
def test_over_a_mesh(sizes, target):
    """Each device computes its rows and heads, or its part of time, preceded by a window of earlier tokens."""
    axes = dict.fromkeys(("data", "fsdp", "sequence", "tensor", "expert"), 1) | sizes
    mesh = meshes.make_mesh(axes, targets.find(target).devices)

    def objective(q, k, v):
        return jnp.sum(operations.sliding_window_attention(q, k, v, window=100).astype(jnp.float32) ** 2)

    x = jax.ShapeDtypeStruct((4, 1024, 4, 64), jnp.bfloat16)
    with sharding.use_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, sharding.spec(("batch", "time", "heads", None), x.shape, mesh))
        text = jax.jit(jax.grad(objective, (0, 1, 2)), in_shardings=place).lower(x, x, x).compile().as_text()
    if target.startswith("h100"):
        assert text.count("__gpu$xla.gpu.triton") == 3
    else:
        assert kernels(text) == KERNELS
    assert "all-gather" not in text and "all-to-all" not in text
