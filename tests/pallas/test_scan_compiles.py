"""The scan kernels that ``auto`` chooses, compiled for absent TPUs and GPUs, forward and backward.

There is one kernel each way, and no array is copied around them: the kernels take the layout that arrays have. On GPU,
ptxas reports each kernel's registers: none is spilled.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import SAVED, backends, linear_recurrence
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import operations, sharding
from tests import compiled_text, ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

kernels = functools.partial(compiled_text.kernels, name="scan")

# name: B, T, D, dtype, what else it has
CASES = {
    "griffin": (2, 2048, 2560, "float32", "packed"),
    "widest": (1, 4096, 8192, "float32", "constant"),
    "longest": (1, 131_072, 8192, "bfloat16", ""),
    "odd": (3, 1000, 300, "bfloat16", "reverse packed"),
    "shortest": (2, 7, 100, "float32", "packed"),
    "complex": (2, 1000, 1024, "complex64", "packed constant"),
    "complex_in_time": (2, 4096, 512, "complex64", "reverse"),
    "over_4_gib": (4, 131_072, 8192, "bfloat16", "packed"),  # on GPU, where offsets have 64 bits then
}
TPUS = {
    "v5e:1x1": ["griffin", "widest", "longest", "odd", "shortest", "complex", "complex_in_time"],
    "v5p:2x2x1": ["griffin", "longest", "complex"],
    "v6e:1x1": ["griffin", "longest", "complex"],
    "tpu7x:2x2x1": ["griffin"],
}


def compiled(target, name, remat=False, **options):
    """The gradient of an objective of h and the last state."""
    batch, length, width, dtype, kinds = CASES[name]
    device = targets.find(target).devices[0]

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    a = array(width) if "constant" in kinds else array(batch, length, width)
    x, ids = array(batch, length, width), array(batch, length, dtype=jnp.int32) if "packed" in kinds else None
    state = array(batch, width, dtype="complex64" if dtype == "complex64" else "float32")

    def both(a, x, state, ids, cotangents):
        def operation(a, x, state):
            return linear_recurrence(a, x, state, segment_ids=ids, reverse="reverse" in kinds)

        if remat:
            operation = jax.checkpoint(operation, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))
        outputs, pullback = jax.vjp(operation, a, x, state)
        return outputs, pullback(cotangents)

    with backends.use_device(device):
        return jax.jit(both).lower(a, x, state, ids, (x, state)).compile(**options)


@pytest.mark.parametrize("target, name", [(target, name) for target, names in TPUS.items() for name in names])
def test_tpu(target, name):
    text = compiled(target, name).as_text()
    batch, length, width, dtype, kinds = CASES[name]
    marks = [mark for mark in ("constant", "packed") if mark in kinds]
    number, (forward, backward) = ["complex"] * (dtype == "complex64"), ([], ["reverse"])
    if "reverse" in kinds:
        forward, backward = backward, forward
    expected = [["forward", *number, *forward], ["gradient", *number, *backward]]
    assert kernels(text) == ["_".join(["scan", *words, *marks]) for words in expected]
    # Complex numbers are split; and XLA is free in the layout of what does not fill registers.
    if dtype != "complex64" and width % 128 == 0:
        assert not compiled_text.copies(text, batch * length * width)


def test_remat_runs_the_forward_kernel_once():
    text = compiled("v5e:1x1", "griffin", remat=True).as_text()
    assert kernels(text) == ["scan_forward_packed", "scan_gradient_reverse_packed"]


def test_copies_are_found():
    """The copies that the tests above look for do appear if an array is required in another layout."""
    device = targets.find("v5e:1x1").devices[0]
    x = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.float32, sharding=SingleDeviceSharding(device))
    text = jax.jit(lambda x: jnp.swapaxes(x, 1, 2)).lower(x).compile().as_text()
    assert compiled_text.copies(text, 2 * 1024 * 1024) == ["2,1024,1024"]


def test_over_a_mesh_of_tpus():
    """Time over 4, channels over 2. Forward: the map of a shard and its states; backward: the gradient of a shard's first
    state, its states again, and the gradients. No map is computed twice."""
    mesh = meshes.make_mesh(
        {"data": 1, "fsdp": 1, "sequence": 4, "tensor": 2, "expert": 1}, targets.find("v5e:2x4").devices
    )

    def objective(a, x):
        return jnp.sum(operations.linear_recurrence(a, x)[0] ** 2)

    x = jax.ShapeDtypeStruct((2, 2048, 1024), jnp.float32)
    with sharding.use_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, sharding.spec(("batch", "time", "recurrent"), x.shape, mesh))
        text = jax.jit(jax.grad(objective, (0, 1)), in_shardings=place).lower(x, x).compile().as_text()
    assert kernels(text) == [
        "scan_forward",
        "scan_forward",
        "scan_gradient_reverse",
        "scan_state_gradient_reverse",
        "scan_summary",
    ]


@pytest.mark.parametrize("name", ["griffin", "longest", "odd", "complex", "over_4_gib"])
def test_h100(name, tmp_path, record_property):
    text = compiled("h100:1", name, compiler_options=ptxas.dumped_to(tmp_path)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    used = ptxas.registers(tmp_path, "scan_")
    record_property("registers", used)
    assert len(used) == 2 and all(32 < registers <= 200 for registers in used.values())
