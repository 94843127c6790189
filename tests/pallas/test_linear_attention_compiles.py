"""Linear attention's kernels that ``auto`` chooses, compiled for absent TPUs and GPUs, forward and backward.

On TPU there is one kernel each way, and no array is copied around them: the kernels take the layout that products produce,
``[B, T, H K]``. On GPU, ptxas reports each kernel's registers: none is spilled.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import SAVED, backends, linear_attention
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import operations, sharding
from tests import compiled_text, ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

kernels = functools.partial(compiled_text.kernels, name="linear_attention")

# name: B, T, H, K, V, dtype, decay, packed
CASES = {
    "none_64": (2, 2048, 4, 64, 64, "bfloat16", "none", True),
    "scalar_128": (1, 4096, 4, 128, 128, "bfloat16", "scalar", True),
    "channel_128": (1, 4096, 4, 128, 128, "bfloat16", "channel", False),
    "constant_256": (1, 2048, 2, 256, 256, "bfloat16", "constant", False),
    "channel_256": (1, 1024, 2, 128, 256, "float32", "channel", True),
    "wide_256": (1, 2048, 2, 256, 256, "float32", "scalar", True),
    "wide_values": (1, 1024, 2, 256, 512, "bfloat16", "channel", False),  # as in GLA 1.3B
    "longest": (1, 131_072, 2, 128, 128, "bfloat16", "scalar", False),
    "odd": (3, 1000, 3, 48, 32, "float32", "scalar", True),
    "wide_blocks": (1, 1024, 8, 240, 256, "float32", "scalar", False),  # 8 heads at once
    "wide_fours": (1, 1024, 4, 224, 224, "float32", "scalar", False),
    "fullest": (8, 4096, 4, 160, 160, "float32", "channel", True),  # the arrays are not in VMEM as a whole
    "in_turns": (8, 4096, 8, 248, 248, "float32", "channel", True),
    "shorter_chunks": (8, 4096, 8, 240, 240, "float32", "scalar", True),  # on v6e
    "narrow": (1, 200, 16, 16, 16, "bfloat16", "channel", True),
    "ragged_heads": (1, 256, 5, 64, 128, "bfloat16", "constant", False),
    # As in Based: without zeros that fill them up, 128 heads would have to be in one block, and GPUs spill registers.
    "odd_widths": (1, 8192, 16, 153, 113, "bfloat16", "none", True),
    "odd_channels": (1, 1024, 16, 72, 65, "float32", "channel", False),
}
ON_GPU = {
    **{
        name: CASES[name]
        for name in ("none_64", "scalar_128", "channel_128", "constant_256", "wide_values", "narrow", "odd_widths")
    },
    "packed_channel_64": (1, 1024, 2, 64, 64, "bfloat16", "channel", True),
    "packed_channel_256": (1, 1024, 2, 256, 256, "bfloat16", "channel", True),
    "odd_128": (1, 1000, 2, 128, 128, "bfloat16", "channel", True),
    "scalar_256": (1, 1024, 2, 256, 256, "bfloat16", "scalar", True),
    "constant_packed": (1, 1024, 2, 128, 128, "bfloat16", "constant", True),
    "few_values": (1, 1024, 2, 64, 16, "bfloat16", "scalar", True),
    "odd_scalar": (1, 1000, 2, 128, 128, "bfloat16", "scalar", True),
    "scalar_unpacked": (1, 2048, 2, 128, 128, "bfloat16", "scalar", False),
    "narrow_channel": (1, 1000, 2, 32, 128, "bfloat16", "channel", True),
    "wide_keys": (1, 1000, 2, 256, 64, "bfloat16", "channel", True),
    # Offsets have 64 bits. With documents 8 bytes spill, for decays by head with JAX 0.10, or 12, by channel with JAX 0.12.
    "over_4_gib": (8, 131_072, 24, 128, 128, "bfloat16", "channel", False),
    "over_4_gib_packed": (8, 131_072, 24, 128, 128, "bfloat16", "constant", True),
}
ON_GPU_SHARED = {  # as ON_GPU, with heads that share queries and keys
    "mamba2": (1, 2048, 64, 128, 64, "bfloat16", "scalar", False),
    "mamba2_packed": (1, 2048, 64, 128, 64, "bfloat16", "scalar", True),
    "odd_64": (1, 1000, 10, 64, 64, "bfloat16", "scalar", True),
    "odd_values": (1, 1000, 10, 256, 32, "bfloat16", "scalar", True),
    "few_values": (1, 1000, 10, 128, 16, "bfloat16", "scalar", True),
    "constant_128": (1, 1000, 10, 128, 128, "bfloat16", "constant", True),
    "none_256": (1, 2048, 10, 256, 256, "bfloat16", "none", False),
    "narrow_keys": (1, 1000, 10, 16, 512, "bfloat16", "scalar", True),
}
TARGETS = {
    "v5e:1x1": list(CASES),
    "v5p:2x2x1": ["scalar_128", "channel_128"],
    "v6e:1x1": [
        "none_64",
        "scalar_128",
        "channel_128",
        "constant_256",
        "wide_256",
        "odd",
        "wide_blocks",
        "wide_fours",
        "ragged_heads",
        "shorter_chunks",
    ],
    "tpu7x:2x2x1": ["channel_128"],
}


def compiled_of(target, case, key_heads=None, remat=False, **options):
    """The gradient of an objective of o and the last state."""
    batch, length, heads, key, value, dtype, decay, packed = case
    key_heads = key_heads or heads
    device = targets.find(target).devices[0]

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    q, v = array(batch, length, key_heads * key), array(batch, length, heads * value)
    log_decay = {
        "none": None,
        "constant": array(heads, dtype=jnp.float32),
        "scalar": array(batch, length, heads, dtype=jnp.float32),
        "channel": array(batch, length, heads * key, dtype=jnp.float32),  # as models have them
    }[decay]
    state = array(batch, heads, key, value, dtype=jnp.float32)
    ids = array(batch, length, dtype=jnp.int32) if packed else None

    def operation(q, k, v, log_decay, state, ids):
        q, k, v = (x.reshape(batch, length, n, -1) for x, n in ((q, key_heads), (k, key_heads), (v, heads)))
        if decay == "channel":
            log_decay = log_decay.reshape(batch, length, heads, key)
        o, final = linear_attention(q, k, v, log_decay, state, segment_ids=ids)
        return o.reshape(batch, length, -1), final

    if remat:
        operation = jax.checkpoint(operation, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))

    def both(q, k, v, log_decay, state, ids, cotangents):
        outputs, pullback = jax.vjp(lambda *x: operation(*x, ids), q, k, v, log_decay, state)
        return outputs, pullback(cotangents)

    with backends.use_device(device):
        return jax.jit(both).lower(q, q, v, log_decay, state, ids, (v, state)).compile(**options)


def names(case, *kinds):
    decay, packed = case[-2:]
    marks = ([decay] if decay != "none" else []) + (["packed"] if packed else [])
    return ["_".join(["linear_attention", kind, *marks]) for kind in kinds]


LEFT_OUT = {  # from what CI compiles
    "v5e:1x1": (
        *("wide_values", "wide_blocks", "wide_fours", "fullest", "in_turns", "shorter_chunks"),
        *("odd_widths", "odd_channels"),
    ),
    "v6e:1x1": ("wide_256", "odd", "wide_blocks", "wide_fours"),
    "tpu7x:2x2x1": ("channel_128",),
}


@pytest.mark.slow(cases=[f"{target}-{name}" for target, names in LEFT_OUT.items() for name in names])
@pytest.mark.parametrize("target, name", [(target, name) for target, cases in TARGETS.items() for name in cases])
def test_tpu(target, name):
    text = compiled_of(target, CASES[name]).as_text()
    batch, length, heads, key, value = CASES[name][:5]
    assert kernels(text) == names(CASES[name], "forward", "gradient")
    if heads * key % 128 == heads * value % 128 == 0:
        assert not compiled_text.copies(text, batch * length * heads * min(key, value))


@pytest.mark.parametrize("target", ["v5e:1x1", "v6e:1x1"])
def test_heads_that_share_keys_on_tpu(target):
    case = (1, 2048, 16, 128, 64, "bfloat16", "scalar", True)  # as in Mamba-2: 8 heads at once
    assert kernels(compiled_of(target, case, 1).as_text()) == names(case, "forward", "gradient")


def test_remat_runs_the_forward_kernel_once():
    case = CASES["none_64"]
    assert kernels(compiled_of("v5e:1x1", case, remat=True).as_text()) == names(case, "forward", "gradient")


@pytest.mark.parametrize("target, key_heads", [("v5e:2x4", 4), ("v6e:2x4", 4), ("v5e:2x4", 1)])
def test_over_a_mesh_of_tpus(target, key_heads):
    """Time over 4, heads over 2; heads have their own queries and keys, or share them. Forward: the map of a shard and its
    outputs; backward: the gradient of a shard's first state, the states of its blocks again, and the gradients. No map is
    computed twice."""
    mesh = meshes.make_mesh(
        {"data": 1, "fsdp": 1, "sequence": 4, "tensor": 2, "expert": 1}, targets.find(target).devices
    )

    def objective(q, k, v):
        return jnp.sum(operations.linear_attention(q, k, v)[0].astype(jnp.float32) ** 2)

    def array(heads):
        shape = 1, 1024, heads, 64
        place = jax.sharding.NamedSharding(mesh, sharding.spec(("batch", "time", "heads", None), shape, mesh))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    q, v = array(key_heads), array(4)
    with sharding.use_mesh(mesh):
        text = jax.jit(jax.grad(objective, (0, 1, 2))).lower(q, q, v).compile().as_text()
    assert kernels(text) == [
        "linear_attention_forward",
        "linear_attention_forward",
        "linear_attention_gradient",
        "linear_attention_state_gradient",
        "linear_attention_summary",
    ]


@pytest.mark.slow(
    cases=("odd_128", "scalar_256", "constant_packed", "odd_scalar", "wide_keys", "odd_widths")
    + ("odd_64-shared", "few_values-shared", "constant_128-shared", "narrow_keys-shared")
)
@pytest.mark.parametrize(
    "case, key_heads",
    [pytest.param(case, case[2], id=name) for name, case in ON_GPU.items()]
    + [pytest.param(case, 1, id=f"{name}-shared") for name, case in ON_GPU_SHARED.items()],
)
def test_h100(case, key_heads, tmp_path, record_property):
    """Forward: the states and the outputs; backward: the gradients of states, of values, and of queries and keys."""
    compiled_of("h100:1", case, key_heads, compiler_options=ptxas.dumped_to(tmp_path))
    used = ptxas.registers(tmp_path, "linear_attention_")
    record_property("registers", used)
    forward, gradient = names(case, "forward", "gradient")
    parts = [(forward, "states"), (forward, "outputs"), (gradient, "states"), (gradient, "values"), (gradient, "keys")]
    assert sorted(used) == sorted("_".join(part) for part in parts)
