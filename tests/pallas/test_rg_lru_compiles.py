"""The kernels of the RG-LRU, gates and recurrence in one, compiled for absent TPUs and GPUs, forward and backward.

There is one kernel each way, and no array as long as the sequence is written in another layout around them. On GPU, ptxas
reports each kernel's registers: none is spilled.
"""

import functools

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear.costs import targets
from jaxlinear.ops import SAVED, backends, rg_lru
from tests import compiled_text, gpus, ptxas

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimised")]

kernels = functools.partial(compiled_text.kernels, name="rg_lru")

# name: B, T, R, N, dtype, packed
CASES = {
    "griffin_1b3": (2, 2048, 2560, 16, "bfloat16", True),
    "griffin_7b": (1, 4096, 5632, 32, "bfloat16", False),
    "recurrentgemma_9b": (1, 4096, 4096, 16, "bfloat16", True),
    "float32": (1, 1024, 5632, 32, "float32", True),
    "longest": (1, 131_072, 4096, 16, "bfloat16", False),
    "half_a_register": (1, 1024, 704, 4, "bfloat16", True),  # Griffin 7B's over 8 devices
    "small": (3, 1000, 300, 20, "float32", True),
    "largest_block": (1, 4096, 1152, 1, "bfloat16", True),
    "many_rows": (16, 1024, 2560, 16, "bfloat16", True),
    "many_long_rows": (8, 131_072, 4096, 16, "bfloat16", False),  # over 4 GiB: offsets have 64 bits
}
ON_GPU = ["griffin_1b3", "griffin_7b", "float32", "longest", "small", "many_rows", "many_long_rows"]
TPUS = {
    "v5e:1x1": [name for name in CASES if not name.startswith("many")],
    "v5p:2x2x1": ["recurrentgemma_9b"],
    "v6e:1x1": ["griffin_1b3"],
    "tpu7x:2x2x1": ["recurrentgemma_9b"],
}


def compiled(device, name, remat=False, **options):
    batch, length, width, count, dtype, packed = CASES[name]

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    x, h, state = array(batch, length, width, dtype=dtype), array(batch, length, width), array(batch, width)
    kernel, vector = array(count, width // count, width // count), array(width)
    ids = array(batch, length, dtype="int32") if packed else None

    def both(first, ids, cotangents, *inputs):
        def operation(*inputs):
            *of_gates, state = inputs
            return rg_lru(*of_gates, first, state, segment_ids=ids)

        if remat:
            operation = jax.checkpoint(operation, policy=jax.checkpoint_policies.save_only_these_names(*SAVED))
        outputs, pullback = jax.vjp(operation, *inputs)
        return outputs, pullback(cotangents)

    with backends.use_device(device):
        inputs = x, kernel, vector, kernel, vector, vector, state
        program = jax.jit(both).lower(array(batch, length, dtype=bool), ids, (h, state), *inputs)
        return program.compile(**options).as_text()


def names(packed, kinds=("forward", "gradient")):
    return [f"rg_lru_{kind}{'_packed' if packed else ''}" for kind in kinds]


@pytest.mark.slow(cases=[f"v5e:1x1-{name}" for name in ("griffin_1b3", "float32", "half_a_register", "largest_block")])
@pytest.mark.parametrize("target, name", [(target, name) for target, names in TPUS.items() for name in names])
def test_tpu(target, name):
    batch, length, width, _, _, packed = CASES[name]
    text = compiled(targets.find(target).devices[0], name)
    assert kernels(text) == names(packed)
    if width % 128 == 0 and length % 128 == 0:
        assert not compiled_text.rearrangements(text, batch * length * width)


def test_remat_runs_the_forward_kernel_once():
    device = targets.find("v5e:1x1").devices[0]
    assert kernels(compiled(device, "recurrentgemma_9b", remat=True)) == names(True)


def on_gpu(device, name, directory, **options):
    """The program's text, and each kernel's registers."""
    text = compiled(device, name, compiler_options=ptxas.dumped_to(directory), **options)
    return text, ptxas.registers(directory, "rg_lru")


def names_on_gpu(name):
    kinds = "forward", "gradient"
    if not name.startswith("many"):  # these occupy a GPU; otherwise programs divide time
        kinds = *kinds, "state_gradient", "summary"
    return names(CASES[name][-1], kinds)


@pytest.mark.slow(but=["griffin_1b3", "float32", "longest", "many_long_rows"])
@pytest.mark.parametrize("name", ON_GPU)
def test_h100(name, tmp_path, record_property):
    text, used = on_gpu(targets.find("h100:1").devices[0], name, tmp_path)
    record_property("registers", used)
    assert sorted(used) == names_on_gpu(name)
    batch, length, width = CASES[name][:3]
    assert not compiled_text.rearrangements(text, batch * length * width)


@pytest.mark.parametrize("gpu", ["a100", "l40"])
def test_other_gpus(gpu, tmp_path):
    _, used = on_gpu(gpus.device(gpu), "griffin_1b3", tmp_path)
    assert sorted(used) == names_on_gpu("griffin_1b3")


def test_remat_runs_the_forward_kernel_once_on_gpu(tmp_path):
    text, _ = on_gpu(targets.find("h100:1").devices[0], "many_rows", tmp_path, remat=True)
    assert text.count("__gpu$xla.gpu.triton") == 2
