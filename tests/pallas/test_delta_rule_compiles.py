"""The delta rule's kernels that ``auto`` chooses, compiled for absent TPUs and GPUs, forward and backward.

On TPU there is one kernel each way, and no array is copied around them: the kernels take the layout that products produce,
``[B, T, H K]``. On GPU, ptxas reports each kernel's registers: none is spilled.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import SAVED, backends, delta_rule
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import operations, sharding
from tests import compiled_text, ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

kernels = functools.partial(compiled_text.kernels, name="delta_rule")

# name: B, T, H, K, V, dtype, decay, packed
CASES = {
    "none_64": (2, 2048, 4, 64, 64, "bfloat16", "none", True),
    "scalar_128": (1, 4096, 4, 128, 256, "bfloat16", "scalar", True),
    "channel_128": (1, 4096, 2, 128, 128, "bfloat16", "channel", False),
    "channel_256": (1, 1024, 1, 256, 256, "bfloat16", "channel", True),
    "none_256": (1, 2048, 2, 256, 256, "float32", "none", False),
    "wide_values": (1, 1024, 9, 200, 400, "bfloat16", "scalar", False),  # as in Gated DeltaNet 1.3B
    # Arrays that are not in VMEM as a whole: blocks of them are, and not much else fits; 13 heads take two turns.
    "fullest": (8, 4096, 8, 256, 256, "float32", "channel", True),
    "in_turns": (8, 4096, 13, 24, 24, "float32", "channel", True),
    "most_states": (8, 4096, 16, 248, 248, "float32", "none", True),  # in turns in the forward pass, too
    "in_turns_by_channel": (8, 4096, 9, 200, 400, "bfloat16", "channel", True),
    "more_forward": (8, 4096, 24, 160, 160, "float32", "channel", True),  # 12 heads at once, and 4 in the gradient
    "registers_shared": (8, 4096, 16, 64, 64, "float32", "channel", True),  # 16 heads at once, and 8 in the gradient
    "longest": (1, 131_072, 2, 128, 128, "bfloat16", "scalar", False),
    "odd": (3, 1000, 3, 48, 32, "float32", "scalar", True),
    "narrow": (1, 200, 9, 16, 16, "bfloat16", "none", True),
    "shortest": (1, 9, 2, 64, 64, "bfloat16", "channel", False),
}
ON_GPU = {
    "scalar_64": (1, 1024, 2, 64, 64, "bfloat16", "scalar", True),
    "odd_64": (1, 1000, 2, 64, 64, "bfloat16", "scalar", True),
    "odd_channel": (1, 1000, 2, 128, 128, "bfloat16", "channel", True),
    "channel_16": (1, 1000, 2, 16, 16, "bfloat16", "channel", True),
    "channel_64": (1, 1000, 2, 64, 64, "bfloat16", "channel", True),
    "narrow_channel": (1, 1000, 2, 32, 128, "bfloat16", "channel", True),
    "many_keys": (1, 1000, 2, 256, 64, "bfloat16", "none", False),
    "scalar_256": (1, 1024, 2, 256, 256, "bfloat16", "scalar", True),
    "none_packed_256": (1, 1024, 2, 256, 256, "bfloat16", "none", True),
    "few_chunks": (1, 200, 2, 128, 128, "bfloat16", "none", False),
    "over_4_gib": (8, 131_072, 24, 128, 128, "bfloat16", "channel", True),  # offsets have 64 bits
    **{
        name: CASES[name]
        for name in ("none_64", "scalar_128", "channel_128", "channel_256", "wide_values", "narrow", "shortest")
    },
}
TARGETS = {
    "v5e:1x1": list(CASES),
    "v5p:2x2x1": ["scalar_128"],
    "v6e:1x1": ["none_64", "scalar_128"],
    "tpu7x:2x2x1": ["scalar_128"],
}


# With negative eigenvalues.
NEGATIVE = [("v5e:1x1", "none_64"), ("v5e:1x1", "channel_256"), ("v5p:2x2x1", "scalar_128"), ("v6e:1x1", "scalar_128")]
NEGATIVE_ON_GPU = ["none_64", "scalar_128", "channel_128", "wide_values"]


def compiled(target, name, remat=False, negative_eigenvalues=False, **options):
    """The gradient of an objective of o and the last state."""
    batch, length, heads, key, value, dtype, decay, packed = (CASES | ON_GPU)[name]
    device = targets.find(target).devices[0]

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    q, v = array(batch, length, heads * key), array(batch, length, heads * value)
    beta = array(batch, length, heads, dtype=jnp.float32)
    log_decay = {"none": None, "scalar": beta, "channel": array(batch, length, heads * key, dtype=jnp.float32)}[decay]
    state = array(batch, heads, key, value, dtype=jnp.float32)
    ids = array(batch, length, dtype=jnp.int32) if packed else None

    def operation(q, k, v, beta, log_decay, state, ids):
        q, k, v = (x.reshape(batch, length, heads, -1) for x in (q, k, v))
        if decay == "channel":
            log_decay = log_decay.reshape(q.shape)
        more = {"segment_ids": ids, "negative_eigenvalues": negative_eigenvalues}
        o, final = delta_rule(q, k, v, beta, log_decay, state, **more)
        return o.reshape(batch, length, -1), final

    if remat:
        operation = jax.checkpoint(operation, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))

    def both(inputs, ids, cotangents):
        outputs, pullback = jax.vjp(lambda *x: operation(*x, ids), *inputs)
        return outputs, pullback(cotangents)

    with backends.use_device(device):
        return jax.jit(both).lower((q, q, v, beta, log_decay, state), ids, (v, state)).compile(**options)


def names(name, *kinds):
    decay, packed = CASES[name][-2:]
    marks = ([decay] if decay != "none" else []) + (["packed"] if packed else [])
    return ["_".join(["delta_rule", kind, *marks]) for kind in kinds]


# The largest blocks take a minute or two each: ``more_forward`` stays. ``wide_values`` is in a published step.
@pytest.mark.slow(
    cases=[
        f"v5e:1x1-{name}"
        for name in ("fullest", "in_turns", "in_turns_by_channel", "most_states", "registers_shared", "wide_values")
    ]
)
@pytest.mark.parametrize("target, name", [(target, name) for target, cases in TARGETS.items() for name in cases])
def test_tpu(target, name):
    text = compiled(target, name).as_text()
    batch, length, heads, key, value = CASES[name][:5]
    assert kernels(text) == names(name, "forward", "gradient")
    if heads * key % 128 == heads * value % 128 == length % 128 == 0:
        assert not compiled_text.copies(text, batch * length * heads * min(key, value))


@pytest.mark.parametrize("target, name", NEGATIVE)
def test_negative_eigenvalues_on_tpu(target, name):
    text = compiled(target, name, negative_eigenvalues=True).as_text()
    assert kernels(text) == names(name, "forward", "gradient")


@pytest.mark.slow(
    cases=[
        f"{name}-False" for name in ("odd_64", "channel_16", "narrow_channel", "many_keys", "few_chunks", "shortest")
    ]
)
@pytest.mark.parametrize(
    "name, negative", [*((name, False) for name in ON_GPU), *((name, True) for name in NEGATIVE_ON_GPU)]
)
def test_h100(name, negative, tmp_path, record_property):
    options = {"compiler_options": ptxas.dumped_to(tmp_path), "negative_eigenvalues": negative}
    text = compiled("h100:1", name, **options).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 6
    used = ptxas.registers(tmp_path, "delta_rule_")
    record_property("registers", used)
    assert len(used) == 6 and all(32 < count <= 255 for count in used.values())


def test_remat_runs_the_forward_kernel_once():
    assert kernels(compiled("v5e:1x1", "none_64", remat=True).as_text()) == names("none_64", "forward", "gradient")


@pytest.mark.parametrize("tensor, kernel", [(1, False), (2, True)])
def test_a_device_has_its_part_of_the_heads(tensor, kernel):
    """20 heads of 153 channels are too many for one block; 10 are not."""
    sizes = {"data": 1, "fsdp": 8 // tensor, "sequence": 1, "tensor": tensor, "expert": 1}
    mesh = meshes.make_mesh(sizes, targets.find("v5e:2x4").devices)
    x, beta = jnp.zeros((8, 32, 20, 153), jnp.bfloat16), jnp.zeros((8, 32, 20))
    with sharding.use_mesh(mesh):
        text = str(jax.jit(lambda *y: operations.delta_rule(*y)[0]).trace(x, x, x, beta).jaxpr)
    assert ("name=delta_rule_forward" in text) == kernel


def test_over_a_mesh_of_tpus():
    """Time over 4, heads over 2. Forward: the map of a shard and its outputs; backward: the gradient of a shard's first
    state, the states of its chunks again, and the gradients. No map is computed twice."""
    mesh = meshes.make_mesh(
        {"data": 1, "fsdp": 1, "sequence": 4, "tensor": 2, "expert": 1}, targets.find("v5e:2x4").devices
    )

    def objective(q, k, v, beta):
        return jnp.sum(operations.delta_rule(q, k, v, beta)[0].astype(jnp.float32) ** 2)

    x, beta = jax.ShapeDtypeStruct((1, 1024, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1024, 4), jnp.float32)
    with sharding.use_mesh(mesh):
        specs = (sharding.spec(("batch", "time", "heads", None)[: y.ndim], y.shape, mesh) for y in (x, x, x, beta))
        places = tuple(jax.sharding.NamedSharding(mesh, spec) for spec in specs)
        gradient = jax.jit(jax.grad(objective, (0, 1, 2, 3)), in_shardings=places)
        text = gradient.lower(x, x, x, beta).compile().as_text()
    kinds = ["forward", "forward", "gradient", "state_gradient", "summary"]
    assert kernels(text) == ["delta_rule_" + kind for kind in kinds]
