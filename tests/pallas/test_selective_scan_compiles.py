"""The selective scan's kernels that ``auto`` chooses, compiled for absent TPUs and GPUs, forward and backward.

There is one kernel each way, and no array as long as the sequence is copied around them. On GPU, ptxas reports each
kernel's registers: none is spilled.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.errors import UserError
from jaxlinear.ops import SAVED, backends, selective_scan
from jaxlinear.ops.selective_scan.op import choose
from jaxlinear.parallel import mesh as meshes
from jaxlinear.parallel import operations, sharding
from tests import compiled_text, ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

kernels = functools.partial(compiled_text.kernels, name="selective_scan")

# name: B, T, D, N, dtype of x, what else it has. All else is float32, as in models.
CASES = {
    "mamba": (2, 2048, 4096, 16, "bfloat16", "packed"),
    "longhorn": (2, 2048, 4096, 16, "bfloat16", "of_keys"),
    "longest": (1, 131_072, 2048, 16, "bfloat16", ""),
    "float32": (1, 4096, 512, 8, "float32", "of_keys packed"),
    "states_64": (1, 2048, 2560, 64, "bfloat16", "packed"),
    "states_128": (1, 2048, 2560, 128, "bfloat16", ""),
    "most_of_128": (2, 512, 9984, 128, "float32", "packed"),
    "most_of_16": (2, 1024, 90_112, 16, "float32", "packed"),
    "odd": (3, 1000, 300, 5, "bfloat16", "packed"),
    "part_of_a_block": (1, 640, 512, 16, "bfloat16", "packed"),
    "shortest": (2, 9, 100, 16, "float32", ""),
}
ON_GPU = {
    **{name: CASES[name] for name in ("mamba", "longhorn", "float32", "states_64", "states_128", "odd", "shortest")},
    "over_4_gib": (8, 131_072, 4096, 16, "bfloat16", "packed"),  # offsets have 64 bits
}
TPUS = {
    "v5e:1x1": list(CASES),
    "v5p:2x2x1": ["mamba", "states_128"],
    "v6e:1x1": ["mamba", "longhorn", "most_of_128"],
    "tpu7x:2x2x1": ["mamba", "most_of_128", "most_of_16"],
}


def compiled(target, name, remat=False, **options):
    """The gradient of an objective of y and the last state."""
    batch, length, width, states, dtype, kinds = (CASES | ON_GPU)[name]
    device = targets.find(target).devices[0]

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    x, ids = (
        array(batch, length, width, dtype=dtype),
        array(batch, length, dtype="int32") if "packed" in kinds else None,
    )
    rates = () if "of_keys" in kinds else (array(width, states),)
    inputs = x, array(*x.shape), *(array(batch, length, states) for _ in range(2)), array(batch, width, states), *rates

    def both(ids, cotangents, *inputs):
        def operation(x, dt, B, C, state, *rates):
            return selective_scan(x, dt, rates[0] if rates else None, B, C, state, segment_ids=ids)

        if remat:
            operation = jax.checkpoint(operation, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))
        outputs, pullback = jax.vjp(operation, *inputs)
        return outputs, pullback(cotangents)

    with backends.use_device(device):
        return jax.jit(both).lower(ids, (x, inputs[4]), *inputs).compile(**options)


def names(name):
    kinds = CASES[name][-1]
    of_keys, packed = (f"_{kind}" if kind in kinds else "" for kind in ("of_keys", "packed"))
    return [f"selective_scan_forward{of_keys}_keep{packed}", f"selective_scan_gradient{of_keys}{packed}"]


LEFT_OUT = {  # from what CI compiles
    "v5e:1x1": ("most_of_16", "float32", "part_of_a_block"),
    "v5p:2x2x1": ("states_128",),
    "v6e:1x1": ("longhorn", "most_of_128"),
    "tpu7x:2x2x1": ("mamba", "most_of_128"),
}


@pytest.mark.slow(cases=[f"{target}-{name}" for target, names in LEFT_OUT.items() for name in names])
@pytest.mark.parametrize("target, name", [(target, name) for target, names in TPUS.items() for name in names])
def test_tpu(target, name):
    text = compiled(target, name).as_text()
    batch, length, width = CASES[name][:3]
    assert kernels(text) == names(name)
    if width % 128 == 0:
        assert not compiled_text.copies(text, batch * length * width)


def test_remat_runs_the_forward_kernel_once():
    assert kernels(compiled("v5e:1x1", "mamba", remat=True).as_text()) == names("mamba")


def test_over_a_mesh_of_tpus():
    """Time over 4, channels over 2. Forward: the map of a shard and its outputs; backward: the gradient of a shard's first
    state, the states of its blocks again, and the gradients. No map is computed twice."""
    mesh = meshes.make_mesh(
        {"data": 1, "fsdp": 1, "sequence": 4, "tensor": 2, "expert": 1}, targets.find("v5e:2x4").devices
    )

    def objective(*inputs):
        return jnp.sum(operations.selective_scan(*inputs)[0] ** 2)

    shapes = (2, 2048, 1024), (2, 2048, 1024), (1024, 16), (2, 2048, 16), (2, 2048, 16)
    axes = ("batch", "time", "recurrent"), ("batch", "time", "recurrent"), ("recurrent", None)
    axes = *axes, ("batch", "time", None), ("batch", "time", None)
    with sharding.use_mesh(mesh):
        places = [
            jax.sharding.NamedSharding(mesh, sharding.spec(names, shape, mesh))
            for names, shape in zip(axes, shapes, strict=True)
        ]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        step = jax.jit(jax.grad(objective, range(5)), in_shardings=places)
        text = step.lower(*inputs).compile().as_text()
    assert kernels(text) == [
        "selective_scan_forward",
        "selective_scan_forward_keep",
        "selective_scan_gradient",
        "selective_scan_state_gradient",
        "selective_scan_summary",
    ]


def test_a_state_that_vmem_has_no_room_for_is_refused():
    """The message gives the limit, in channels per device, and a remedy; the shapes of ``most`` are about the largest."""
    devices = targets.find("v5e:2x4").devices
    for states, most in ((16, 90_112), (64, 28_416), (128, 9984)):
        for width in (most, most + 1):
            x, A, B = (
                jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 16, width), (width, states), (1, 16, states))
            )
            with backends.use_device(devices[0]):
                assert choose("auto", x, x, A, B, B) == ("pallas" if width == most else "auto")
    message = (
        r"takes up to 9,984 channels of 128 numbers per device, .* not 19,968; mesh.tensor splits them; .*'chunked'"
    )
    x, A, B = jnp.ones((2, 16, 19_968)), jnp.ones((19_968, 128)), jnp.ones((2, 16, 128))
    with backends.use_device(devices[0]), pytest.raises(UserError, match=message):
        selective_scan(x, x, A, B, B, backend="pallas")
    for sizes in ({"tensor": 2, "fsdp": 4}, {"tensor": 2, "sequence": 4}):
        mesh = meshes.make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, "expert": 1} | sizes, devices)
        with sharding.use_mesh(mesh):
            text = jax.jit(lambda *y: operations.selective_scan(*y)[0]).trace(x, x, A, B, B).jaxpr
        assert "name=selective_scan_forward" in str(text)


@pytest.mark.parametrize("name", ON_GPU)
def test_h100(name, tmp_path, record_property):
    """Nothing goes through shared memory, as it would if the layout over lanes changed."""
    text = compiled("h100:1", name, compiler_options=ptxas.dumped_to(tmp_path)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    used = ptxas.registers(tmp_path, "selective_scan_")
    record_property("registers", used)
    assert len(used) == 2 and all(64 < registers <= 255 for registers in used.values())
    if name != "odd":
        kernels = [text for text in (ptx.read_text() for ptx in tmp_path.glob("*.ptx")) if ".entry selective" in text]
        assert len(kernels) == 2 and not any(".shared." in text or "bar.sync" in text for text in kernels)
